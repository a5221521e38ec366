"""Passes by name: what each does, how it may change numbers, and the options it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..ir import Graph, each_layer
from .remarks import Remark

NUMERICS = ("exact", "reassociates", "changes-precision")
OPTION_KINDS = ("int", "float", "bool", "str", "tuple[str, ...]")
Outcome = tuple[Graph, tuple[Remark, ...]]


@dataclass(frozen=True)
class Option:
    """A keyword of a pass: its written type, its default, and its values where they are few."""

    name: str
    kind: str
    default: Any
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """A registered function Graph -> Graph."""

    name: str
    run: Callable[..., Any]
    numerics: str
    options: tuple[Option, ...]
    about: str
    model: bool  # sees the entry with its layers, instead of each distinct layer and then the entry
    gradients: bool = False  # cotangents stand behind its inputs then, gradients behind its results


PASSES: dict[str, Pass] = {}


def register(
    *, numerics: str, model: bool = False, gradients: bool = False, choices: Mapping[str, tuple[str, ...]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Name a pass after its function; keyword-only parameters are its options, the docstring says what it is for."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics is {numerics!r}, must be one of {NUMERICS}")

    def define(fn: Callable[..., Any]) -> Callable[..., Any]:
        name = fn.__name__.replace("_", "-")
        if not fn.__doc__ or name in PASSES:
            raise ValueError(f"pass {name} needs a docstring and a name of its own")
        params = [p for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = tuple(Option(p.name, str(p.annotation), p.default, (choices or {}).get(p.name, ())) for p in params)
        if bad := [o.name for o in options if o.kind not in OPTION_KINDS or o.default is inspect.Parameter.empty]:
            raise ValueError(f"pass {name}: option {bad[0]} needs a default and one of the types {OPTION_KINDS}")
        PASSES[name] = Pass(name, fn, numerics, options, fn.__doc__.strip().splitlines()[0], model, gradients)
        return fn

    return define


def apply(made: Pass, graph: Graph, options: Mapping[str, Any]) -> Outcome:
    """Run a pass on every distinct layer once and on the entry, or on the whole model."""
    remarks = list[Remark]()

    def change(part: Graph) -> Graph:
        outcome = made.run(part, **options)
        new, said = (outcome, ()) if isinstance(outcome, Graph) else outcome
        remarks.extend(said)
        return new

    after = change(graph) if made.model else each_layer(graph, change)
    return after, tuple(replace(r, by=made.name) for r in remarks)
