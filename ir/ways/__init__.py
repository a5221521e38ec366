"""Ways of ops across split tokens, one file for each kind of op; importing them makes them known."""

from . import losses, places

__all__ = ["losses", "places"]
