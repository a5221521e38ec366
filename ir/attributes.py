"""Attributes of an op: which there are, and of which type."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

from .errors import TypeMismatch
from .op import REQUIRED, OpDef

_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,), "None": (type(None),)}


def check_attrs(op: OpDef, given: Mapping[str, Any]) -> dict[str, Any]:
    """The op's attributes, defaults filled in; a TypeMismatch names an unknown, missing or mistyped one."""
    for name in given:
        if name not in op.attrs:
            near = difflib.get_close_matches(name, op.attrs, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(op.attrs) or 'none'}"
            raise TypeMismatch(f"{op.name} has no attribute {name}; {hint}")
    full = {name: given.get(name, default) for name, default in op.attrs.items()}
    for name, value in full.items():
        if value is REQUIRED:
            raise TypeMismatch(f"{op.name}: attribute {name} is missing")
        full[name] = _checked(op, name, value)
    return full


def _checked(op: OpDef, name: str, value: Any) -> Any:
    wanted = attr_kind(op, name)
    if wanted.startswith("tuple"):
        if isinstance(value, list | tuple) and all(isinstance(x, int | float | str) for x in value):  # type: ignore[reportUnknownVariableType] # any sequence
            return tuple(value)  # type: ignore[reportUnknownArgumentType] # its items were checked above
        raise TypeMismatch(f"{op.name}: attribute {name} is {value!r}, must be a {wanted}")
    kinds = tuple(k for part in wanted.split(" | ") for k in _KINDS[part])
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeMismatch(f"{op.name}: attribute {name} is {value!r}, must be a {wanted}")
    if isinstance(value, float) and not math.isfinite(value) and not (math.isinf(value) and "inf" in str(op.attrs[name])):
        raise TypeMismatch(f"{op.name}: attribute {name} is {value!r}, must be finite")
    return float(value) if "float" in wanted and isinstance(value, int) and not isinstance(value, bool) else value


def attr_kind(op: OpDef, name: str) -> str:
    """The written type of an attribute, `float | None`."""
    return str(inspect.signature(op.reference).parameters[name].annotation)
