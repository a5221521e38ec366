"""Megatron's orders, exchanges and mixers, from their definitions: what ranks hold, what moves, what layers compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from plait.ir import ParseError, PlaitError, TypeMismatch, ops, parse, parse_mesh, parse_type, scatter
from plait.ir.interp import arranged, natural
from plait.ir.orders import here

from tests import megatron_adapter
from tests.megatron_adapter import cp_order, everywhere, furthest, gdn_forward, head_perm, mamba_forward

Tensor = torch.Tensor
RANKS = [2, 3, 4, 8]

# -- orders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cp", "digits"), [(1, "12"), (2, "1423"), (3, "162534"), (4, "18273645")])
def test_chunks_from_both_ends_meet_on_a_rank(cp: int, digits: str) -> None:
    redo = cp_order(2 * cp, cp)
    assert "".join(str(int(i) + 1) for i in redo) == digits
    undo = [*range(0, 2 * cp, 2), *range(2 * cp - 1, 0, -2)]
    assert redo.argsort().tolist() == undo
    assert [digits[i] for i in undo] == sorted(digits)


@pytest.mark.parametrize("cp", RANKS)
def test_a_rank_holds_what_the_loader_gives_it(cp: int) -> None:
    x = torch.arange(6 * cp)
    chunks = x.chunk(2 * cp)
    for rank in range(cp):
        loaded = torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])
        assert torch.equal(here(f"zigzag({cp})", len(x), cp, rank), loaded)
    whole = torch.cat([torch.cat([chunks[r], chunks[2 * cp - 1 - r]]) for r in range(cp)])
    assert torch.equal(x[cp_order(len(x), cp)], whole)


@pytest.mark.parametrize("cp", RANKS)
def test_packed_segments_are_cut_one_by_one(cp: int) -> None:
    for lengths in ([4, 2, 6], [2, 0, 4, 0], [0, 2]):
        cu = [0, *torch.tensor([n * cp for n in lengths]).cumsum(0).tolist()]
        parts = [torch.arange(a, b).chunk(2 * cp) for a, b in pairwise(cu) if b > a]
        wanted = torch.cat([torch.cat([p[r], p[2 * cp - 1 - r]]) for r in range(cp) for p in parts])
        assert torch.equal(cp_order(cu[-1], cp, cu), wanted)


def test_a_type_says_the_order_and_it_is_undone() -> None:
    type_, x = parse_type("f64[2, s@cp:zigzag(3), 5]"), torch.randn(2, 18, 5)
    shards = scatter(arranged(x, type_), type_, parse_mesh("cp=3"))
    assert torch.equal(shards[0], torch.cat([x[:, 0:3], x[:, 15:18]], 1))
    assert torch.equal(natural(torch.cat(shards, 1), type_), x)


# -- exchanges --------------------------------------------------------------------------------


def swapped(shards: Sequence[Tensor], src: int, dst: int) -> list[Tensor]:
    """The product's all_to_all among ranks."""
    assert ops.all_to_all.rank_rule
    return [*ops.all_to_all.rank_rule([*shards], axis="cp", src=src, dst=dst)]


def by_section(shards: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Each section exchanged by itself, tokens for features."""
    parts = [[x.split([*sizes], 2)[i] for x in shards] for i in range(len(sizes))]
    moved = [swapped(part, 0, 2) for part in parts]
    return [torch.cat([m[r] for m in moved], 2) for r in range(len(shards))]


def test_the_places_of_features() -> None:
    wanted = [0, 1, 4, 5, 8, 9, 10, 11, 16, 2, 3, 6, 7, 12, 13, 14, 15, 17]
    assert head_perm((4, 4, 8, 2), 2).tolist() == wanted


@pytest.mark.parametrize("cp", RANKS)
def test_one_exchange_of_permuted_features_is_one_of_every_section(cp: int) -> None:
    sizes = [2 * cp, 2 * cp, 3 * cp, 3 * cp, cp, cp]
    x = torch.randn(4 * cp, 2, sum(sizes))
    shards = [*x[cp_order(len(x), cp)].chunk(cp)]
    there = swapped([s.index_select(2, head_perm(sizes, cp)) for s in shards], 0, 2)
    apart = by_section(shards, sizes)
    undo = cp_order(len(x), cp).argsort()
    for rank, (a, b) in enumerate(zip(there, apart, strict=True)):
        assert torch.equal(a, b)
        own = torch.cat([part.chunk(cp, 2)[rank] for part in x.split(sizes, 2)], 2)
        assert torch.equal(a[undo], own)
    home = [y.index_select(2, head_perm(sizes, cp).argsort()) for y in swapped(there, 2, 0)]
    assert all(torch.equal(a, b) for a, b in zip(home, shards, strict=True))


@pytest.mark.parametrize("cp", RANKS)
def test_what_travels_both_ways_comes_back_as_it_was(cp: int) -> None:
    z, redo = torch.randn(4 * cp, 2, 3 * cp), cp_order(4 * cp, cp)
    shards = [*z.chunk(cp)]
    there = [y[redo.argsort()] for y in swapped(shards, 0, 2)]
    back = swapped([y[redo] for y in there], 2, 0)
    assert all(torch.equal(a, b) for a, b in zip(back, shards, strict=True))


@pytest.mark.parametrize("cp", [2, 4])
def test_a_parameter_is_cut_section_by_section(cp: int) -> None:
    sizes, w = [2 * cp, 2 * cp, 3 * cp], torch.randn(7 * cp, 4)
    type_ = parse_type(f"f64[{7 * cp}@cp:sections({cp},{','.join(map(str, sizes))}), 4]")
    shards = scatter(arranged(w, type_), type_, parse_mesh(f"cp={cp}"))
    for rank, mine in enumerate(shards):
        assert torch.equal(mine, torch.cat([part.chunk(cp)[rank] for part in w.split(sizes)]))


# -- hazards ----------------------------------------------------------------------------------

HAZARDS: list[tuple[str, Callable[[], object], str]] = [
    ("a length that is no multiple of 2 cp", lambda: cp_order(10, 2), "10 tokens do not divide into 4 chunks; pad"),
    ("as many chunks as torch makes of it", lambda: cp_order(6, 2), "6 tokens do not divide into 4 chunks"),
    ("segments that cp divides, but not 2 cp", lambda: cp_order(16, 2, [0, 6, 16]), "6 tokens do not divide into 4 chunks"),
    ("a segment of fewer tokens than chunks", lambda: cp_order(10, 2, [0, 2, 10]), "2 tokens do not divide into 4 chunks"),
    ("sections that do not divide", lambda: head_perm((4, 3), 2), "a section of 3 has no equal share for 2 ranks"),
    ("parts of a sectioned dim that are read as plain ones", lambda: parse(PLAIN), "must see the last dim whole"),
    ("sections parted by sizes that they do not have", lambda: parse(OTHER), "one or more of the"),
    ("a length that ranks divide, split as a zigzag", lambda: _held(10), "10 tokens do not divide into 4 chunks"),
]  # fmt: skip
PLAIN = "def f(x: f64[b, s, 6@cp:sections(2,2,4)]):\n    a, c = split(x, sizes=(2, 4))\n    return a, c\n"
OTHER = "def f(x: f64[b, s, 6@cp:sections(2,2,4)]):\n    a, c = split(x, sizes=(4, 2), parts=2)\n    return a, c\n"


def _held(length: int) -> Tensor:
    return arranged(torch.zeros(length), parse_type("f64[s@cp:zigzag(2)]"))


@pytest.mark.parametrize(("what", "act", "why"), HAZARDS, ids=[h[0] for h in HAZARDS])
def test_a_hazard_is_refused_by_name(what: str, act: Callable[[], object], why: str) -> None:
    with pytest.raises(PlaitError, match=why) as caught:
        act()
    assert isinstance(caught.value, TypeMismatch | ParseError)


# -- layers, token by token -------------------------------------------------------------------


def conv(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Tap 3 is the token itself; silu behind."""
    past = F.pad(x, (0, 0, 3, 0))
    y = torch.stack([w[:, 0, i] * past[:, i : i + x.shape[1]] for i in range(4)]).sum(0)
    return F.silu(y if bias is None else y + bias)


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def rms(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def gdn_alone(p: Mapping[str, Tensor], x: Tensor, shape: tuple[int, int, int, int], eps: float, centered: bool) -> Tensor:
    """One sequence [b, s, h], a token at a time."""
    keys, heads, k_dim, v_dim = shape
    sizes = [keys * k_dim, keys * k_dim, heads * v_dim, heads * v_dim, heads, heads]
    q, k, v, z, beta, alpha = (x @ p["in_proj.weight"].T).split(sizes, -1)
    q, k, v = conv(torch.cat([q, k, v], -1), p["conv1d.weight"], p.get("conv1d.bias")).split(sizes[:3], -1)
    q, k = (unit(y.unflatten(-1, (keys, k_dim))).repeat_interleave(heads // keys, 2) for y in (q, k))
    v, z = (y.unflatten(-1, (heads, v_dim)) for y in (v, z))
    decay = (-p["A_log"].exp() * F.softplus(alpha + p["dt_bias"])).exp()
    state, out = x.new_zeros(len(x), heads, k_dim, v_dim), list[Tensor]()
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state
        u = beta[:, t, :, None].sigmoid() * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, ..., None] * u[..., None, :]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * k_dim**-0.5)
    o = rms(torch.stack(out, 1), eps) * (p["out_norm.weight"] + centered) * F.silu(z)
    return o.flatten(2) @ p["out_proj.weight"].T


def mamba_alone(p: Mapping[str, Tensor], x: Tensor, shape: tuple[int, int, int, int], eps: float, normed: bool) -> Tensor:
    """One sequence [b, s, h], a token at a time."""
    heads, width, groups, n = shape
    z, xbc, dt = (x @ p["in_proj.weight"].T).split([heads * width, heads * width + 2 * groups * n, heads], -1)
    xs, key, query = conv(xbc, p["conv1d.weight"], p["conv1d.bias"]).split([heads * width, groups * n, groups * n], -1)
    xs = xs.unflatten(-1, (heads, width))
    key, query = (y.unflatten(-1, (groups, n)).repeat_interleave(heads // groups, 2) for y in (key, query))
    dt = F.softplus(dt + p["dt_bias"])
    decay = (-p["A_log"].exp() * dt).exp()
    state, out = x.new_zeros(len(x), heads, width, n), list[Tensor]()
    for t in range(x.shape[1]):
        made = (dt[:, t, :, None] * xs[:, t])[..., None] * key[:, t, :, None]
        state = decay[:, t, :, None, None] * state + made
        out.append(torch.einsum("bhpn,bhn->bhp", state, query[:, t]))
    skip = p["D"][:, None] if p["D"].numel() == heads else p["D"].unflatten(0, (heads, width))
    y = (torch.stack(out, 1) + skip * xs).flatten(2) * F.silu(z)
    if normed:
        y = rms(y.unflatten(-1, (groups, -1)), eps).flatten(2) * p["norm.weight"]
    return y @ p["out_proj.weight"].T


def segmented(layer: Callable[[Tensor], Tensor], x: Tensor, cu: Sequence[int] | None) -> Tensor:
    """Every packed segment by itself; sequence first."""
    rows, borders = x.transpose(0, 1), cu or [0, len(x)]
    return torch.cat([layer(rows[:, a:b]) for a, b in pairwise(borders) if b > a], 1).transpose(0, 1)


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {k.replace("__", "."): torch.randn(s, dtype=torch.float64) * 0.5 for k, s in shapes.items()}


GDN = (4, 8, 3, 5)


@pytest.mark.parametrize(
    ("centered", "bias", "cu"),
    [(False, False, None), (True, True, None), (False, False, [0, 8, 24, 32]), (True, True, [0, 4, 4, 16])],
)
def test_gated_delta_nets_in_all_ways(centered: bool, bias: bool, cu: list[int] | None) -> None:
    keys, heads, k_dim, v_dim = GDN
    channels = 2 * keys * k_dim + heads * v_dim
    p = drawn(
        in_proj__weight=(channels + heads * v_dim + 2 * heads, 6), conv1d__weight=(channels, 1, 4), A_log=(heads,),
        dt_bias=(heads,), out_norm__weight=(v_dim,), out_proj__weight=(6, heads * v_dim), conv1d__bias=(channels,),
    )  # fmt: skip
    p = p if bias else {k: v for k, v in p.items() if k != "conv1d.bias"}
    x = torch.randn(cu[-1] if cu else 16, 1 if cu else 2, 6, dtype=torch.float64)
    wanted = segmented(lambda y: gdn_alone(p, y, GDN, 1e-6, centered), x, cu)
    found = gdn_forward(p, x, *GDN, 1e-6, centered, cu, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("groups", "wide", "normed", "cu"),
    [
        (1, False, True, None),
        (2, False, True, [0, 8, 16]),
        (4, True, True, None),
        (2, False, False, None),
        (8, True, False, [0, 4, 16]),
    ],
)
def test_mamba_mixers_in_all_ways(groups: int, wide: bool, normed: bool, cu: list[int] | None) -> None:
    shape = heads, width, _, n = 8, 3, groups, 5
    channels = heads * width + 2 * groups * n
    p = drawn(
        in_proj__weight=(channels + heads * width + heads, 6), conv1d__weight=(channels, 1, 4), conv1d__bias=(channels,),
        A_log=(heads,), dt_bias=(heads,), D=(heads * width if wide else heads,), norm__weight=(heads * width,),
        out_proj__weight=(6, heads * width),
    )  # fmt: skip
    x = torch.randn(cu[-1] if cu else 16, 1 if cu else 2, 6, dtype=torch.float64)
    wanted = segmented(lambda y: mamba_alone(p, y, shape, 1e-5, normed), x, cu)
    found = mamba_forward(p, x, *shape, 1e-5, normed, cu, wide)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_every_way_is_tried_and_the_worst_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    one, off = torch.ones(3), torch.tensor([1.0, 1.0, 1.5])
    assert furthest({"one device": one, "a": one.clone(), "b": off}) is off
    assert furthest({"one device": one, "a": off, "b": one * torch.nan}).isnan().all()
    seen = list[list[str]]()
    real = everywhere

    def watched(*args: object) -> dict[str, Tensor]:
        found = real(*args)  # type: ignore[arg-type] # passed on
        seen.append([*found])
        return found

    monkeypatch.setattr(megatron_adapter, "everywhere", watched)
    test_mamba_mixers_in_all_ways(2, False, True, [0, 8, 16])
    orders = ("natural", "zigzag-packed")
    two = [f"cp=2 {way} {order}" for way in ("heads", "states", "scan", "chain") for order in orders]
    assert seen == [["one device", *two, "cp=4 heads zigzag-packed", "cp=4 chain zigzag-packed"]]
