"""Forms of the recurrence family that run generated kernels: on the device, or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .op import final_state, linear_recurrence

Maybe = Tensor | None
Face = Callable[..., tuple[Tensor, Tensor]]


def gated(update: str, interpreted: bool) -> Face:
    """A member with decay and beta."""
    run = partial(linear_recurrence, update=update, interpreted=interpreted)

    def face(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor,
        state: Maybe = None,
        cu: Maybe = None,
        *,
        scale: float = 1.0,
        carried: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return run(q, k, v, decay, beta, state, cu, scale=scale, carried=carried)

    return face


def written(interpreted: bool) -> Face:
    """The delta rule without decay."""

    run = partial(linear_recurrence, update="delta", interpreted=interpreted)

    def face(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        state: Maybe = None,
        cu: Maybe = None,
        *,
        scale: float = 1.0,
        carried: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return run(q, k, v, None, beta, state, cu, scale=scale, carried=carried)

    return face


def decayed(interpreted: bool) -> Face:
    """The additive member with a decay alone: per token, or one slope per head."""

    run = partial(linear_recurrence, update="additive", interpreted=interpreted)

    def face(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        state: Maybe = None,
        cu: Maybe = None,
        *,
        scale: float = 1.0,
        carried: bool = False,
    ) -> tuple[Tensor, Tensor]:
        decay = decay.expand(*v.shape[:2], -1) if decay.dim() == 1 else decay
        return run(q, k, v, decay, None, state, cu, scale=scale, carried=carried)

    return face


def final(interpreted: bool) -> Callable[..., Tensor]:
    """The state that a delta rule ends in."""

    def face(k: Tensor, v: Tensor, decay: Maybe, beta: Tensor, state: Maybe = None, cu: Maybe = None) -> Tensor:
        return final_state(k, v, decay, beta, state, cu, interpreted=interpreted)

    return face


_MEMBERS: dict[str, Callable[[bool], Callable[..., Any]]] = {
    "gated_delta_rule": partial(gated, "delta"),
    "kimi_delta_attention": partial(gated, "delta"),
    "ssd": partial(gated, "additive"),
    "delta_rule": written,
    "gated_linear_attention": decayed,
    "retention": decayed,
    "gated_delta_final": final,
    "kimi_delta_final": final,
}


def faces(*, interpreted: bool) -> dict[str, Any]:
    """Every member's form by its op's name."""
    found = {name: make(interpreted) for name, make in _MEMBERS.items()}
    for name, face in found.items():
        face.__name__ = name
    return found
