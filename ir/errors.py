"""Errors a user can act on: what is wrong, where, what it is, what it must be."""

from __future__ import annotations


class PlaitError(Exception):
    """Base of every error raised on purpose; its text is all a user needs to see."""


class SpecError(PlaitError):
    """A model spec that cannot be."""


class TypeMismatch(PlaitError):
    """Operand types do not fit an op's signature."""


class PlacementError(PlaitError):
    """Types fit, but a value lives where an op cannot use it."""


class ParseError(PlaitError):
    """Text that does not parse."""


class PassError(PlaitError):
    """A pass that cannot run, or that changed what a program computes."""


class CheckpointError(PlaitError):
    """Saved tensors that do not fit the model."""


class DataError(PlaitError):
    """Input data that cannot be used."""
