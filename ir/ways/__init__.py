"""Ways of ops across split tokens, one file for each kind of op; importing them makes them known."""

from . import attention, conv, dropping, expert_rows, losses, places, recurrence, reorder, scan, vocabulary

__all__ = ["attention", "conv", "dropping", "expert_rows", "losses", "places", "recurrence", "reorder", "scan", "vocabulary"]
