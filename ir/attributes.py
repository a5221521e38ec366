"""Attributes of an op: which there are, and of which type."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from .errors import TypeMismatch
from .op import REQUIRED, OpDef

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}


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
    if wanted.startswith("tuple["):
        item = wanted.removeprefix("tuple[").removesuffix(", ...]")
        if not isinstance(value, list | tuple) or not all(_fits(x, item) for x in value):  # type: ignore[reportUnknownVariableType] # any sequence
            raise TypeMismatch(f"{op.name}: attribute {name} is {_shown(value)}, must be a {wanted}")
        return tuple(_number(op, name, x, item) for x in value)  # type: ignore[reportUnknownVariableType] # its items were checked above
    if wanted.startswith("Literal["):
        choices = re.findall(r"""['"](.*?)['"]""", wanted)
        if value not in choices:
            raise TypeMismatch(f"{op.name}: attribute {name} is {_shown(value)}, must be one of {', '.join(choices)}")
        return value
    if not _fits(value, wanted):
        raise TypeMismatch(f"{op.name}: attribute {name} is {_shown(value)}, must be a {wanted}")
    return _number(op, name, value, wanted)


def _fits(value: Any, wanted: str) -> bool:
    kinds = tuple(k for part in wanted.split(" | ") for k in _KINDS[part])
    return isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def _number(op: OpDef, name: str, value: Any, wanted: str) -> Any:
    """The value, an integer for a float made one; numbers no tensor can hold are refused."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, int) and abs(value) >= 2**63:
        raise TypeMismatch(f"{op.name}: attribute {name} is {_shown(value)}, must be under 2**63")
    if not math.isfinite(value) and not (math.isinf(value) and "inf" in str(op.attrs[name])):
        raise TypeMismatch(f"{op.name}: attribute {name} is {value!r}, must be finite")
    return float(value) if "float" in wanted else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def attr_kind(op: OpDef, name: str) -> str:
    """The written type of an attribute, `float | None`."""
    return _kinds(op.reference)[name]


@cache
def _kinds(reference: Callable[..., Any]) -> dict[str, str]:
    return {p.name: str(p.annotation) for p in inspect.signature(reference).parameters.values()}
