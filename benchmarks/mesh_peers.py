"""A gated delta net over split tokens in plain torch, as two others do it: Megatron-core's exchanges, and fla's summaries.

Megatron-core: tokens come as a zigzag, sequence first. Every section of the projection (q, k, v, z, beta, alpha) is exchanged
for heads, put into its natural order, and what comes out is put back into the zigzag and exchanged home: seven exchanges, or
two where the features are permuted first. The rule is its torch function, chunks of 64.
fla: tokens in natural order. Every rank makes a summary (state, transition) of its tokens by a pass without outputs, all ranks
gather all summaries, and each starts from what those before it say; the backward does the same from the end.
fla's own code is Triton for GPUs; its scheme stands here in torch, with a triangular solve where its kernels invert blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

Tensor = torch.Tensor
Params = Mapping[str, Tensor]
CHUNK, EPS = 64, 1e-6


@dataclass(frozen=True)
class Sizes:
    """A layer, and what it runs on."""

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    tokens: int
    batch: int

    @property
    def sections(self) -> list[int]:
        """Rows of the projection: q, k, v, z, beta, alpha."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return [keys, keys, values, values, self.value_heads, self.value_heads]


@dataclass
class Wire:
    """This rank among the others, and what it has sent them."""

    ranks: int
    rank: int
    calls: int = 0
    bytes: int = 0

    def count(self, sent: int) -> None:
        self.calls, self.bytes = self.calls + 1, self.bytes + sent

    def swap(self, parts: Tensor) -> Tensor:
        """[ranks, ...]: a part for each rank, for what each had for this one."""
        parts = parts.contiguous()
        got = torch.empty_like(parts)
        self.count(parts.numel() * parts.element_size() * (self.ranks - 1) // self.ranks)
        dist.all_to_all_single(got, parts)
        return got

    def gather(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        self.count(x.numel() * x.element_size() * (self.ranks - 1))
        told = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(told, x)
        return told

    def shift(self, x: Tensor, step: int) -> Tensor:
        """What the rank before this one (behind, for -1) had; zeros at the end of the line."""
        x = x.contiguous()
        got, to, of = torch.zeros_like(x), self.rank + step, self.rank - step
        moves = [dist.P2POp(dist.isend, x, to)] if 0 <= to < self.ranks else []
        moves += [dist.P2POp(dist.irecv, got, of)] if 0 <= of < self.ranks else []
        self.count(x.numel() * x.element_size() if 0 <= to < self.ranks else 0)
        for work in dist.batch_isend_irecv(moves):
            work.wait()
        return got


# -- the rule in chunks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What every chunk is made of, [b, heads, chunks, 64, ...]; the state is all that joins chunks."""

    q: Tensor  # with what is left of the state at each token
    scores: Tensor
    k: Tensor  # with what is left of each token at the end
    w: Tensor
    u: Tensor
    last: Tensor


def terms(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, loop: bool) -> Terms:
    """q, k, v [b, s, heads, d], g and beta [b, s, heads]; `loop` substitutes forwards row by row, as Megatron-core does."""
    pad = -q.shape[1] % CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    g, beta = (F.pad(x, (0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in (g, beta))
    q, kb, vb = q * q.shape[-1] ** -0.5, k * beta[..., None], v * beta[..., None]
    total = g.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    lower = (kb @ k.mT * decay).tril(-1)
    left, right = torch.cat([vb, kb * total[..., None].exp()], -1), q @ k.mT * decay
    solved = _substituted(lower) @ left if loop else torch.linalg.solve_triangular(_with_unit(lower), left, upper=False)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    ends = total[..., -1:]
    return Terms(q * total[..., None].exp(), right, k * (ends - total).exp()[..., None], w, u, ends.exp()[..., None])


def _with_unit(lower: Tensor) -> Tensor:
    return lower + torch.eye(CHUNK, dtype=lower.dtype)


def _substituted(lower: Tensor) -> Tensor:
    """The inverse of 1 + lower, row by row."""
    rows = -lower
    for i in range(1, CHUNK):
        row, above = rows[..., i, :i].clone(), rows[..., :i, :i].clone()
        rows[..., i, :i] = row + (row[..., None] * above).sum(-2)
    return _with_unit(rows)


def outputs(x: Terms, state: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """o [b, s, heads, v] from a state on, and the state at the end."""
    made = list[Tensor]()
    for i in range(x.q.shape[2]):
        new = x.u[:, :, i] - x.w[:, :, i] @ state
        made.append(x.q[:, :, i] @ state + x.scores[:, :, i] @ new)
        state = state * x.last[:, :, i] + x.k[:, :, i].mT @ new
    return torch.cat(made, 2)[:, :, :tokens].transpose(1, 2), state


def summary(x: Terms) -> tuple[Tensor, Tensor]:
    """What all chunks make of no state, and what they do to one."""
    width = x.k.shape[-1]
    both = torch.cat([x.u.new_zeros(*x.u.shape[:2], width, x.u.shape[-1]), _units(x, width)], -1)
    values = both.shape[-1] - width
    for i in range(x.q.shape[2]):
        new = F.pad(x.u[:, :, i], (0, width)) - x.w[:, :, i] @ both
        both = both * x.last[:, :, i] + x.k[:, :, i].mT @ new
    return both[..., :values], both[..., values:]


def _units(x: Terms, width: int) -> Tensor:
    return torch.eye(width, dtype=x.u.dtype).expand(*x.u.shape[:2], -1, -1)


# -- the layer's own parts --------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def conv(x: Tensor, w: Tensor, before: Tensor | None = None) -> Tensor:
    """[b, s, c], silu behind; `before` are the inputs in front of the first."""
    rows = (F.pad(x, (0, 0, w.shape[1] - 1, 0)) if before is None else torch.cat([before, x], 1)).transpose(1, 2)
    return F.silu(F.conv1d(rows, w[:, None], groups=w.shape[0])).transpose(1, 2)


def operands(p: Params, qkv: Tensor, beta: Tensor, alpha: Tensor, sizes: Sizes, shares: int = 1) -> tuple[Tensor, ...]:
    """q, k, v, g, beta of a share of the heads; key heads are repeated."""
    keys, heads = sizes.key_heads // shares, sizes.value_heads // shares
    q, k, v = qkv.split([n // shares for n in sizes.sections[:3]], -1)
    q, k = (unit(x.unflatten(-1, (keys, -1))).repeat_interleave(heads // keys, 2) for x in (q, k))
    g = -p["A_log"].exp() * F.softplus(alpha + p["dt_bias"])
    return q, k, v.unflatten(-1, (heads, -1)), g, beta.sigmoid()


def gated(p: Params, o: Tensor, z: Tensor) -> Tensor:
    """The norm of every head, then its gate."""
    normed = o * (o.square().mean(-1, keepdim=True) + EPS).rsqrt() * p["out_norm"]
    return (normed * F.silu(z.unflatten(-1, o.shape[-2:]))).flatten(2)


def whole(p: Params, x: Tensor, sizes: Sizes) -> Tensor:
    """The layer on one device, x [b, s, h]."""
    *qkv, z, beta, alpha = (x @ p["w_in"].T).split(sizes.sections, -1)
    given = operands(p, conv(torch.cat(qkv, -1), p["conv"]), beta, alpha, sizes)
    o, _ = outputs(terms(*given, loop=False), _no_state(given[1], given[2]), x.shape[1])
    return gated(p, o, z) @ p["w_out"].T


def _no_state(k: Tensor, v: Tensor) -> Tensor:
    return v.new_zeros(len(v), v.shape[2], k.shape[-1], v.shape[-1])


# -- Megatron-core ----------------------------------------------------------------------------


def order_of(tokens: int, ranks: int) -> Tensor:
    """Where the tokens that ranks hold stand: chunks r and 2 ranks - 1 - r."""
    chunks = torch.arange(tokens).reshape(2 * ranks, -1)
    return torch.cat([torch.cat([chunks[r], chunks[2 * ranks - 1 - r]]) for r in range(ranks)])


class _ToHeads(torch.autograd.Function):
    """[s / ranks, b, f] to [s, b, f / ranks], and back in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return _heads(x, wire)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        return _tokens(d, ctx.wire), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return _tokens(x, wire)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        return _heads(d, ctx.wire), None


def _heads(x: Tensor, wire: Wire) -> Tensor:
    return wire.swap(x.unflatten(2, (wire.ranks, -1)).movedim(2, 0)).flatten(0, 1)


def _tokens(x: Tensor, wire: Wire) -> Tensor:
    return wire.swap(x.unflatten(0, (wire.ranks, -1))).movedim(0, 2).flatten(2)


def megatron(p: Params, x: Tensor, sizes: Sizes, wire: Wire, *, apart: bool, loop: bool) -> Tensor:
    """x [s / ranks, b, h] of a zigzag; `apart` exchanges every section by itself."""
    ranks, redo = wire.ranks, order_of(sizes.tokens, wire.ranks)
    undo, shares = redo.argsort(), [n // ranks for n in sizes.sections]
    wide = x @ p["w_in"].T
    if apart:
        moved = [cast(Tensor, _ToHeads.apply(part.contiguous(), wire))[undo] for part in wide.split(sizes.sections, -1)]
    else:
        packed = wide.index_select(2, _by_rank(sizes, ranks))
        moved = cast(Tensor, _ToHeads.apply(packed, wire))[undo].split(shares, -1)
    *qkv, z, beta, alpha = (part.transpose(0, 1) for part in moved)
    mine = {k: p[k].chunk(ranks)[wire.rank] for k in ("A_log", "dt_bias")}
    taps = torch.cat([part.chunk(ranks)[wire.rank] for part in p["conv"].split(sizes.sections[:3])])
    given = operands(mine, conv(torch.cat(qkv, -1), taps), beta, alpha, sizes, ranks)
    o, _ = outputs(terms(*given, loop=loop), _no_state(given[1], given[2]), sizes.tokens)
    y = gated(p, o, z).transpose(0, 1).contiguous()[redo]
    return cast(Tensor, _ToTokens.apply(y, wire)) @ p["w_out"].T


def _by_rank(sizes: Sizes, ranks: int) -> Tensor:
    """Features so that every rank's share of all sections stands together."""
    parts = torch.arange(sum(sizes.sections)).split(sizes.sections)
    return torch.cat([part.chunk(ranks)[r] for r in range(ranks) for part in parts])


# -- fla --------------------------------------------------------------------------------------


class _Halo(torch.autograd.Function):
    """The last inputs of the rank before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, wire: Wire) -> Tensor:
        ctx.wire, ctx.shape = wire, x.shape
        return wire.shift(x[:, x.shape[1] - count :], 1)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        got = ctx.wire.shift(d, -1)
        return F.pad(got, (0, 0, ctx.shape[1] - got.shape[1], 0)), None, None


class _Summed(torch.autograd.Function):
    """The rule on a rank's tokens, from what all summaries before it say; its backward from what those behind it say."""

    @staticmethod
    def forward(ctx: Any, wire: Wire, *given: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in given]
            parts = terms(*leaves, loop=False)  # type: ignore[arg-type] # five operands
        with torch.no_grad():
            made, through = summary(parts)
        told, state = wire.gather(torch.cat([made, through], -1)), torch.zeros_like(made)
        for each in told[: wire.rank]:
            state = each[..., made.shape[-1] :] @ state + each[..., : made.shape[-1]]
        with torch.enable_grad():
            ctx.begun = state.requires_grad_()
            ctx.made = outputs(parts, ctx.begun, given[0].shape[1])
        ctx.wire, ctx.leaves, ctx.through = wire, leaves, through
        return ctx.made[0].detach()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        (o, end), wire, through = ctx.made, ctx.wire, ctx.through
        (own,) = torch.autograd.grad(o, [ctx.begun], d, retain_graph=True)
        told, state = wire.gather(torch.cat([own, through.mT], -1)), torch.zeros_like(own)
        for each in reversed(told[wire.rank + 1 :]):
            state = each[..., own.shape[-1] :] @ state + each[..., : own.shape[-1]]
        return None, *torch.autograd.grad([o, end], ctx.leaves, [d, state])


def fla(p: Params, x: Tensor, sizes: Sizes, wire: Wire) -> Tensor:
    """x [b, s / ranks, h] in natural order."""
    *qkv, z, beta, alpha = (x @ p["w_in"].T).split(sizes.sections, -1)
    rows = torch.cat(qkv, -1)
    before = cast(Tensor, _Halo.apply(rows, p["conv"].shape[1] - 1, wire))
    given = operands(p, conv(rows, p["conv"], before), beta, alpha, sizes)
    return gated(p, cast(Tensor, _Summed.apply(wire, *given)), z) @ p["w_out"].T
