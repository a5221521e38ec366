"""One of four ranks of the programs in test_ways_attention_processes: runs them all and leaves numbers and bytes in files."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from plait.ir import Graph, parse, parse_mesh
from plait.ir.gradient import cotangent_type
from plait.lowering.forms.crossing import watch
from plait.lowering.table import choose
from plait.passes import differentiate
from plait.runtime import spmd
from plait.runtime.mesh import Place, close, init, launched
from plait.runtime.spmd import gathered, gradients, run
from safetensors.torch import save_file

from tests.attention_cases import F64, Given, Tensor, crossed_by, split, tensors, whole

WAIT = 120.0


@dataclass(frozen=True)
class Case:
    """A placed program, the same on one device, the mesh it runs on, and the tensors it is run on."""

    text: str
    whole: str
    mesh: str
    given: Given

    @property
    def graph(self) -> Graph:
        return parse(self.text)


def _crossing(given: Given, way: str) -> Case:
    mesh = f"cp={given.ranks}" if given.ranks == 4 else f"dp={4 // given.ranks},cp={given.ranks}"
    return Case(split(given, way), whole(given), mesh, given)


TWO_AXES = Given(2, 24, heads=(8, 4), batch=2)
CASES = {
    "kv": _crossing(Given(4, 20, batch=2, sinks=True), "kv"),
    "kv zigzag": _crossing(Given(2, 20, "zigzag", options="window=5, softcap=2.0"), "kv"),
    "kv packed": _crossing(Given(4, 40, "packed", cu=(0, 8, 8, 24, 40)), "kv"),
    "ring": _crossing(Given(4, 28, heads=(3, 1), batch=2), "ring"),
    "ring of two": _crossing(Given(2, 14, widths=(5, 5), sinks=True), "ring"),
    "ring zigzag": _crossing(Given(4, 40, "zigzag", batch=2, sinks=True), "ring"),
    "ring window": _crossing(Given(4, 20, options="window=3"), "ring"),
    "ring, all see all": _crossing(Given(2, 14, options="causal=False, softcap=1.5"), "ring"),
    "ring packed": _crossing(Given(4, 20, cu=(0, 5, 5, 12, 20), sinks=True), "ring"),
    "ring zigzag of segments": _crossing(Given(2, 20, "packed", cu=(0, 4, 12, 12, 20)), "ring"),
    "heads and ring": Case(crossed_by("ring"), whole(TWO_AXES), "a=2,r=2", TWO_AXES),
    "heads and kv": Case(crossed_by("kv", "zigzag(4)"), whole(TWO_AXES), "a=2,r=2", TWO_AXES),
}  # fmt: skip


def drawn(case: Case) -> tuple[list[Tensor], Tensor]:
    """Inputs and a cotangent, the same on every rank."""
    torch.manual_seed(5)
    inputs = [x.detach() for x in tensors(case.given)]
    return inputs, torch.randn(*inputs[0].shape[:3], case.given.widths[1], dtype=F64)


def by_autograd(case: Case, place: Place) -> dict[str, Tensor]:
    """Global results and gradients, by the ops' references on each rank."""
    graph, (inputs, d_y) = case.graph, drawn(case)
    made = gradients(graph, place, inputs, {}, [d_y])
    found = {"y": (made.results[0], graph.outputs[0].type)}
    pairs = enumerate(zip(made.inputs, graph.inputs, strict=True))
    found |= {f"d{i}": (d, cotangent_type(v.type)) for i, (d, v) in pairs if d is not None}
    everywhere = gathered([x for x, _ in found.values()], [t for _, t in found.values()], place)
    return dict(zip(found, everywhere, strict=True))


def by_forms(case: Case, place: Place) -> dict[str, Tensor]:
    """The same by the fast forms."""
    with patch.object(spmd, "choose", lambda node, _: choose(node, "cpu")):  # type: ignore[reportUnknownLambdaType] # as spmd calls it
        return by_autograd(case, place)


def by_text(case: Case, place: Place) -> dict[str, Tensor]:
    """The same from the program whose gradients are IR."""
    graph, (inputs, d_y) = differentiate(case.graph)[0], drawn(case)
    results = run(graph, place, [*inputs, d_y])
    floats = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    everywhere = gathered(results, [v.type for v in graph.outputs], place)
    return dict(zip(["y", *(f"d{i}" for i in floats)], everywhere, strict=True))


def counted(case: Case, place: Place) -> list[int]:
    """Bytes that this rank sends forward, forward and back, and forward and back where the gradient is text."""
    totals = list[int]()
    graph, (inputs, d_y) = case.graph, drawn(case)
    back = differentiate(graph)[0]
    for step in (
        lambda: run(graph, place, inputs),
        lambda: gradients(graph, place, inputs, {}, [d_y]),
        lambda: run(back, place, [*inputs, d_y]),
    ):
        found = list[int]()
        end = watch(lambda _axis, _request, size, found=found: found.append(size))
        step()
        end()
        totals.append(sum(found))
    return totals


def main(out: Path) -> None:
    rank = launched().rank
    numbers, sent = dict[str, Tensor](), dict[str, list[int]]()
    for i, mesh in enumerate(dict.fromkeys(case.mesh for case in CASES.values())):
        place = init(mesh, store=f"file://{out}/store{i}", timeout=WAIT)
        assert place.mesh == parse_mesh(mesh)
        for name, case in CASES.items():
            for way in (by_autograd, by_forms, by_text) if case.mesh == mesh else ():
                numbers |= {f"{name}/{way.__name__}/{k}": x.contiguous() for k, x in way(case, place).items()}
            if case.mesh == mesh:
                sent[name] = counted(case, place)
        close()
    save_file(numbers, out / f"rank{rank}.safetensors")
    (out / f"rank{rank}.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
