"""Lowering of placed programs: kernels over a rank's own tensors, views of split dims, exchanges that know where they stand."""

import pytest
import torch
from plait.ir import Graph, parse, parse_mesh
from plait.lowering import lower
from plait.lowering.forms.traffic import AxisGroup, MeshError, count_anew, moved, tally, traffic, use_axes

GATHER = "    g = all_gather(z, axis='cp', dim=1)  # from layers.3\n"
KERNEL = (
    """def f(x: f32[b, s@cp, 16@tp], w: f32[16@tp]):
    y = k(x, w)
    z = reshape(y, pattern='b s (h d=2) -> b s h d')
"""
    + GATHER
    + """    return g, y

@kernel
def k(x: f32[b, s@cp, 16@tp], w: f32[16@tp]):
    y = add_bias(x, w)
    z = silu(y)
    return z
"""
)


def reasons(graph: Graph, mesh: str) -> list[tuple[str, str]]:
    made = lower(graph, target="interpreter", mesh=parse_mesh(mesh) if mesh else None)
    return [(c.runs, c.why) for c in made.choices if c.op == "k"]


def test_a_kernel_is_made_for_a_ranks_own_sizes() -> None:
    ((runs, _),) = reasons(parse(KERNEL), "cp=2,tp=4")
    assert runs == "row kernel"
    ((runs, why),) = reasons(parse(KERNEL), "")
    assert runs == "op by op" and "split over a mesh that the lowering was not told" in why
    ((runs, why),) = reasons(parse(KERNEL.replace("s@cp", "(s+1)@cp")), "cp=2,tp=4")
    assert runs == "op by op" and "has no share that is one symbol" in why


def test_a_rank_runs_kernels_and_views_on_its_part() -> None:
    graph = parse(KERNEL.replace(GATHER, "").replace("return g", "return z"))
    x, w = torch.randn(2, 5, 4), torch.randn(4)
    for target in ("cpu", "interpreter"):
        z, y = lower(graph, target=target, mesh=parse_mesh("cp=2,tp=4")).entry(x, w)
        wanted = torch.nn.functional.silu(x + w)
        torch.testing.assert_close(y, wanted)
        assert torch.equal(z, y.unflatten(2, (2, 2)))


def test_an_exchange_is_told_where_it_stands() -> None:
    assert "axis = 'cp', dim = 1, at = 'layers.3'" in lower(parse(KERNEL)).source


def test_traffic_is_counted_and_failures_are_placed() -> None:
    use_axes({"cp": AxisGroup("none", 4, 2)})
    try:
        count_anew()
        tally("cp", 10)
        assert moved("all_gather", "cp", "layers.3", 32, lambda: 7) == 7
        assert (traffic()["cp"].calls, traffic()["cp"].bytes) == (2, 42)
        count_anew()
        assert not traffic()

        def lost() -> None:
            raise RuntimeError("Connection closed by peer\nand more")

        said = "^all_gather over cp at layers.3 did not end on rank 2 of cp: Connection closed by peer; another rank"
        with pytest.raises(MeshError, match=said):
            moved("all_gather", "cp", "layers.3", 32, lost)
        assert not traffic()
    finally:
        use_axes({})
