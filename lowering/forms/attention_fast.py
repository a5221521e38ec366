"""Which kernel runs attention on a CPU, by sizes alone: generated C++, torch's flash kernel where little is to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cpp import attention as generated

if TYPE_CHECKING:
    from .attention import Masking

# Tokens up to which torch, which packs nothing, is sooner done.
SHORT = 48
_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def brief(q: Tensor) -> bool:
    """Whether so few tokens are seen to come, before anything runs, that torch shall have them."""
    t = q.shape[1]
    return not torch.compiler.is_dynamo_compiling() and type(t) is int and t <= SHORT


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether C++ is made for such operands, numbers in them or not."""
    narrow = max(q.shape[3], v.shape[3]) <= generated.WIDEST
    return q.device.type == "cpu" and narrow and all(x.dtype in generated.TYPES for x in (q, k, v))


def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Masking) -> bool:
    """Whether torch's flash kernel knows all that is hidden."""
    bare = sinks is None and how.cu is None and not how.window and not how.softcap and k.shape[-1] == v.shape[-1]
    return bare and (not how.causal or (how.at == 0 and q.shape[1] == k.shape[1]))


def generates(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Whether C++ runs a call."""
    return q.device.type == "cpu" and q.shape[1] > SHORT and generated.ready(q, k, v, sinks)


def empty(q: Tensor, k: Tensor) -> bool:
    """Whether there is nothing to see, or nobody who sees."""
    return q.numel() == 0 or k.numel() == 0


def nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What is made of it."""
    (b, t, h, _), g = q.shape, k.shape[2]
    return q.new_zeros(b, t, h, v.shape[3]), _wide(q).new_full((b * g, h // g, t), generated.NEVER)


def flashes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Masking) -> bool:
    """Whether torch's flash kernel runs a call that C++ does not."""
    return q.device.type == "cpu" and plain(q, k, v, sinks, how)


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Masking) -> tuple[Tensor, Tensor]:
    """The output, and the log of each softmax's denominator [b*g, r, t]."""
    o, lse = generated.forward(q, k, v, _sight(how), _logits(sinks, how))
    return o, lse.view(-1, q.shape[2] // k.shape[2], q.shape[1])


def backward(
    d_o: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Masking
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of queries, keys, values and sinks."""
    d = generated.backward(d_o, o, lse, q, k, v, _sight(how), _logits(sinks, how))
    return d.q, d.k, d.v, d.sinks


def flash(q: Tensor, k: Tensor, v: Tensor, how: Masking) -> tuple[Tensor, Tensor]:
    """The same by torch, in float32 at least: its bfloat16 is far slower without a matrix unit."""
    queries, keys, values = _for_flash(q, k, v)
    o, lse = _FLASH(queries, keys, values, 0.0, how.causal, attn_mask=None, scale=how.scale)
    return o.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous().view(-1, q.shape[2] // k.shape[2], q.shape[1])


def flash_backward(
    d_o: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, how: Masking
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients; heads of a group are added up."""
    given = _for_flash(q, k, v)
    grads, outs = (_wide(x).transpose(1, 2) for x in (d_o, o))
    rows = lse.view(q.shape[0], q.shape[2], q.shape[1])
    d_q, *others = _FLASH_BACKWARD(grads, *given, outs, rows, 0.0, how.causal, attn_mask=None, scale=how.scale)
    d_k, d_v = (
        d.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2).to(x.dtype) for d, x in zip(others, (k, v), strict=True)
    )
    return d_q.transpose(1, 2).to(q.dtype).contiguous(), d_k.contiguous(), d_v.contiguous()


def _for_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[b h t d] each, heads of a group repeated."""
    r = q.shape[2] // k.shape[2]
    keys, values = (_wide(x).repeat_interleave(r, 2).transpose(1, 2) for x in (k, v))
    return _wide(q).transpose(1, 2), keys, values


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sight(how: Masking) -> generated.Sight:
    return generated.Sight(how.at, how.causal, how.window, None if how.cu is None else torch.tensor(how.cu))


def _logits(sinks: Tensor | None, how: Masking) -> generated.Logits:
    return generated.Logits(how.scale, how.softcap, sinks)
