"""What ranks run alone beside exchanges: final states and stencils of packed segments, against what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plait.ir import ops
from plait.lowering.forms import gated_delta_final, kimi_delta_final, stencils

from tests.ways import Tensor, close, gradients, leaves

FACES: dict[str, tuple[Callable[..., Tensor], Any, str]] = {
    "gated": (gated_delta_final, ops.gated_delta_final, "head"),
    "plain": (gated_delta_final, ops.gated_delta_final, "none"),
    "kimi": (kimi_delta_final, ops.kimi_delta_final, "channel"),
}
FACE = pytest.mark.parametrize("name", FACES)
RAGGED = [0, 0, 1, 64, 70, 130, 130]


def operands(
    kind: str, t: int, cu: list[int] | None = None, *, b: int = 2, k: int = 7, v: int = 5, strong: float = 0.1
) -> list[Tensor | None]:
    rng = torch.Generator().manual_seed(t)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    b, runs = (1, len(cu) - 1) if cu else (b, b)
    key, shape = normal(b, t, 2, k), {"head": (b, t, 4), "channel": (b, t, 4, k), "none": (0,)}[kind]
    decay = None if kind == "none" else -normal(*shape).abs() * strong
    borders = torch.tensor(cu) if cu else None
    key = key / key.norm(dim=-1, keepdim=True)
    return [key, normal(b, t, 4, v), decay, torch.sigmoid(normal(b, t, 4)), normal(runs, 4, k, v), borders]


@FACE
@pytest.mark.parametrize(("t", "cu"), [(1, None), (63, None), (65, None), (130, RAGGED), (130, [0, 130])], ids=str)
@pytest.mark.parametrize("strong", [0.1, 30.0])
def test_final_states_and_their_gradients(name: str, t: int, cu: list[int] | None, strong: float) -> None:
    form, op, kind = FACES[name]
    for state in (True, False):
        xs = operands(kind, t, cu, strong=strong)
        xs = xs if state else [*xs[:4], None, xs[5]]
        a, b = leaves(xs), leaves(xs)
        found, wanted = form(*a), op.reference(*b)
        close([found], [wanted], 1e-11)
        close(gradients([found], a), gradients([wanted], b), 1e-10)
        with torch.no_grad():
            close([form(*a)], [wanted], 1e-11)


@FACE
def test_a_unit_state_fades_to_zero_and_never_below_what_is_normal(name: str) -> None:
    """In float32, over as many tokens as make subnormal numbers of it: values and gradients are those of float64."""
    form, op, kind = FACES[name]
    xs = operands(kind, 300, b=1, strong=0.6)
    xs[1], xs[4] = torch.zeros(1, 300, 4, 7).double(), torch.eye(7).double().expand(1, 4, 7, 7).contiguous()
    single = leaves([x.float() if x is not None and x.is_floating_point() else x for x in xs])
    found, a = form(*single), leaves(xs)
    wanted = op.reference(*a)
    tiny = torch.finfo(torch.float32).tiny
    assert bool(((found == 0) | (found.abs() >= tiny)).all())
    close([found.double()], [wanted], 1e-6)
    close([d.double() for d in gradients([found], single)], gradients([wanted], a), 1e-5)


@FACE
def test_final_states_keep_torchs_promises(name: str) -> None:
    xs = operands(FACES[name][2], 65, [0, 3, 65])
    for keep in (False, True):
        torch.library.opcheck(
            torch.ops.plait.recurrence_final, (*leaves(xs), keep), test_utils=("test_schema", "test_faketensor")
        )
    torch.library.opcheck(torch.ops.plait.recurrence_final, (*leaves(xs), True))


@pytest.mark.parametrize("cu", [[0, 5, 5, 6, 8, 20], [0, 0, 1], [0, 63], [0, 2, 4, 5, 5], None], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_stencils_of_packed_segments(cu: list[int] | None, k: int) -> None:
    t, n = (cu[-1], len(cu) - 1) if cu else (9, 1)
    borders = torch.tensor(cu) if cu else None
    x, g, w, end = (torch.randn(s, dtype=torch.float64) for s in ((1, t, 3), (1, t, 3), (3, k), (n, 3, k - 1)))
    for final in (end, None):
        cases: list[tuple[Any, Any, list[Any], dict[str, int]]] = [
            (stencils.anticausal_conv1d, ops.anticausal_conv1d, [g, w, final, borders], {}),
            (stencils.conv1d_taps, ops.conv1d_taps, [x, g, final, borders], {"k": k}),
        ]
        for form, op, xs, attrs in cases:
            a, b = leaves(xs), leaves(xs)
            found, wanted = form(*a, **attrs), op.reference(*b, **attrs)
            found, wanted = (list(y) if isinstance(y, tuple) else [y] for y in (found, wanted))
            close(found, wanted, 1e-12)
            close(gradients(found, a), gradients(wanted, b), 1e-12)
