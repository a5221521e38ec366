"""Programs of all small presets, and what must hold of a program that a pass has rewritten."""

from functools import cache

from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.presets import PRESETS
from plait.frontends.shrink import shrink
from plait.ir import Graph, dump, parse
from plait.passes import check_types, differentiate, validate

TINY = [p.name for p in PRESETS if p.name.endswith("-tiny") or p.name == "demo"]


@cache
def preset(name: str, task: str = "loss", packed: bool = False, dtype: str = "f64") -> Graph:
    return build(shrink(load_spec(name)), task=task, dtype=dtype, packed=packed)


def gradients(graph: Graph) -> Graph:
    """The program with its gradients."""
    made: Graph = differentiate(graph)[0]
    return made


def agree(before: Graph, after: Graph, *, bound: float = 1e-10, gradients: bool = False) -> None:
    """Well typed, the same when read back, the same numbers and gradients; these are results too with `gradients`."""
    check_types(after)
    assert parse(dump(after)) == after
    report = validate(before, after, "reassociates", gradients=gradients)
    assert report.ok and report.rows, report
    assert max(r.error for r in report.rows) <= bound, report.worst


def gradients_agree(before: Graph, after: Graph) -> None:
    """A program with its gradients has autograd's."""
    agree(before, after, gradients=True)
