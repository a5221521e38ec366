"""The cached program: read in pieces, it says what the whole says at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.shrink import shrink
from plait.ir import DTYPES, Graph, PassError, evaluate, parse
from plait.ir.sizes import value
from plait.passes import DEFAULT, Pipeline, State, cache_states, check_types, fuse, with_cache
from plait.passes.samples import draw

LENGTH, ROOM = 9, 11
SPEC: dict[str, Any] = {
    "name": "pieces", "vocab": 61, "hidden": 20,
    "blocks": ["gdn", "local", "kda", "mlp", "mamba2", "attention", "gdn", "latent"],
    "gdn": {"key_heads": 1, "value_heads": 2, "key_dim": 5, "value_dim": 7},
    "kda": {"heads": 3, "head_dim": 5},
    "mamba2": {"heads": 4, "groups": 2, "head_dim": 3, "state": 5},
    "mlp": {"width": 13},
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "qk_norm": True, "gate": True, "rope": {"theta": 100.0}},
    "kinds": {"local": {"kind": "attention", "heads": 3, "head_dim": 5, "window": 3, "sinks": True},
              "latent": {"kind": "mla", "heads": 3, "own_dim": 5, "shared_dim": 2, "value_dim": 4, "kv_rank": 7,
                         "rope": {"theta": 100.0}}},
}  # fmt: skip


@cache
def program(task: str = "logits") -> Graph:
    return build(load_spec(SPEC), task=task, dtype="f64")


def sample() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(3)
    return torch.randint(0, 61, (2, LENGTH), generator=rng), dict(draw(program()).params)


def fresh(state: State) -> torch.Tensor:
    """Noise where a cache has nothing yet: what is not written must not be read."""
    shape = [value(d, {"b": 2, "m": ROOM}) for d in state.type.shape]
    made = torch.zeros(shape, dtype=DTYPES[state.type.dtype])
    return made + 1e3 if state.kind in ("k_cache", "v_cache") else made


def in_pieces(cached: Graph, borders: Sequence[int]) -> torch.Tensor:
    """Logits of the tokens between borders, call by call."""
    tokens, params = sample()
    states, found = [fresh(s) for s in cache_states(cached)], list[torch.Tensor]()
    for start, end in pairwise(borders):
        y, *states = evaluate(cached, tokens[:, start:end], torch.tensor(start), *states, params=params)
        found.append(y)
    return torch.cat(found, 1)


SPLITS = [[0, LENGTH], *([0, i, LENGTH] for i in range(1, LENGTH)), [0, 1, 4, 5, 8, LENGTH], list(range(LENGTH + 1))]


@pytest.mark.parametrize("borders", SPLITS, ids=str)
def test_pieces_make_the_whole(borders: list[int]):
    tokens, params = sample()
    whole = evaluate(program(), tokens, params=params)
    got = in_pieces(with_cache(program())[0], borders)
    torch.testing.assert_close(got, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pipeline", ["with-cache," + DEFAULT, "canonicalize,carry-residual,with-cache,fuse,outline-rows,dce"])
def test_pieces_make_the_whole_after_other_passes(pipeline: str):
    tokens, params = sample()
    whole = evaluate(program(), tokens, params=params)
    cached = Pipeline.parse(pipeline).run(program(), verify="types", require=("norm-gate", "qkv-prep"))
    torch.testing.assert_close(in_pieces(cached, [0, 4, 5, LENGTH]), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("before", ["", "carry-residual,"])
def test_last_keeps_the_last_token_of_each_piece(before: str):
    tokens, params = sample()
    whole = evaluate(program(), tokens, params=params)
    cached = Pipeline.parse(before + "with-cache{last=true}").run(program(), verify="types")
    got = in_pieces(cached, [0, 4, 5, LENGTH])
    torch.testing.assert_close(got, whole[:, [3, 4, 8]], rtol=1e-11, atol=1e-12)
    heads = [n for n in cached.nodes if n.is_op("last_token")]
    assert len(heads) == (2 if before else 1)


def test_a_forgotten_state_would_be_seen():
    """The law can fail: drop one state's way in and pieces differ from the whole."""
    tokens, params = sample()
    whole = evaluate(program(), tokens, params=params)
    text = str(with_cache(program())[0])
    for broken in (
        text.replace("state=conv_state, ", "", 1),
        text.replace(", recurrent_state, scale", ", scale", 1),
        text.replace("positions(tokens, at)", "positions(tokens)"),
        text.replace("window=3", "window=4"),
    ):
        assert broken != text
        got = in_pieces(parse(broken), [0, 4, LENGTH])
        assert (got - whole).abs().max() > 1e-6


def test_states_are_named_typed_and_in_order():
    cached, remarks = with_cache(program())
    check_types(cached)
    states = cache_states(cached)
    assert [f"{s.name} {s.type} {s.kind}" for s in states] == [
        "layers_0_conv_state f64[b, 24, 3] conv_state",
        "layers_0_recurrent_state f64[b, 2, 5, 7] recurrent_state",
        "layers_1_k_cache f64[b, m, 3, 5] k_cache",
        "layers_1_v_cache f64[b, m, 3, 5] v_cache",
        "layers_2_conv_state f64[b, 45, 3] conv_state",
        "layers_2_recurrent_state f64[b, 3, 5, 5] recurrent_state",
        "layers_4_conv_state f64[b, 32, 3] conv_state",
        "layers_4_recurrent_state f64[b, 4, 5, 3] recurrent_state",
        "layers_5_k_cache f64[b, m, 2, 6] k_cache",
        "layers_5_v_cache f64[b, m, 2, 6] v_cache",
        "layers_6_conv_state f64[b, 24, 3] conv_state",
        "layers_6_recurrent_state f64[b, 2, 5, 7] recurrent_state",
        "layers_7_k_cache f64[b, m, 1, 9] k_cache",
    ]
    assert [v.name for v in cached.inputs[:2]] == ["tokens", "at"]
    assert [v.type for v in cached.outputs[1:]] == [s.type for s in states]
    assert len(cached.layers) == len(program().layers) and len(remarks) == len(states)


LATENT = """
def f(q: f64[b, s, 2, 5], c: f64[b, s, {rank}], s: f64[b, s, 1, 2], *, w: f64[14, {rank}] = normal(1.0)):
    y = linear(c, w)
    z = reshape(y, pattern='{heads}')
    a, v = split(z, sizes=(3, 4))
    r = repeat_heads(s, r=2)
    k = concat(a, r)
    o = attention(q, k, v{window})
    return o
"""
BY_HEADS = "... (h=2 d) -> ... h d"


def test_rows_that_keys_and_values_are_made_of_wait_where_they_are_narrower():
    """One cache of 6 numbers a token where keys and values have 18; rows as wide as both, a window, or other heads keep two."""
    narrow = LATENT.format(rank=4, heads=BY_HEADS, window="")
    assert [str(s.type) for s in cache_states(with_cache(parse(narrow))[0])] == ["f64[b, m, 1, 6]"]
    for rank, heads, window in ((16, BY_HEADS, ""), (4, BY_HEADS, ", window=2"), (4, "b t (d h=2) -> b t h d", "")):
        kept = cache_states(with_cache(parse(LATENT.format(rank=rank, heads=heads, window=window)))[0])
        assert [str(s.type) for s in kept] == ["f64[b, m, 2, 5]", "f64[b, m, 2, 4]"]


def test_recurrent_states_stay_wide_and_caches_take_the_model_s_dtype():
    states = cache_states(with_cache(build(load_spec("demo")))[0])
    assert {s.kind: s.type.dtype for s in states} == {
        "conv_state": "bf16", "recurrent_state": "f32", "k_cache": "bf16", "v_cache": "bf16",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["demo", "llama-3-8b-tiny", "mamba-2-2.7b-tiny"])
@pytest.mark.parametrize("options", ["", "{last=true}"])
def test_the_first_call_is_validated_against_the_uncached_program(name: str, options: str):
    Pipeline.parse(f"with-cache{options}").run(build(shrink(load_spec(name))), verify="numeric")


def test_a_graph_without_layers_is_cached_too():
    flat = parse("""
def f(x: f64[b, s, 6], *, c: f64[6, 4] = normal(0.5)):
    y, final = causal_conv1d(x, c)
    z, last = causal_conv1d(y, c)
    return z
""")
    cached, _ = with_cache(flat)
    assert [s.name for s in cache_states(cached)] == ["conv_state", "conv_state_2"]


def test_keys_and_values_each_have_their_own_cache():
    flat = parse("""
def f(q: f64[b, s, 2, 5], k: f64[b, s, 1, 5], v: f64[b, s, 1, 7]):
    o = attention(q, k, v)
    return o
""")
    states = cache_states(with_cache(flat)[0])
    assert [f"{s.name} {s.type}" for s in states] == ["k_cache f64[b, m, 1, 5]", "v_cache f64[b, m, 1, 7]"]


def refused(graph: Graph, says: str, **options: bool) -> None:
    with pytest.raises(PassError, match=says):
        with_cache(graph, **options)


def test_what_cannot_be_cached_is_refused_by_name():
    spec = load_spec(SPEC)
    refused(build(spec, packed=True), r"with-cache: (causal_conv1d|positions) .*: it is packed \(cu\)")
    refused(with_cache(program())[0], "has an input `at`: it is cached already")
    refused(fuse(program())[0], r"preamble .*holds a state inside a kernel; run with-cache before fuse")
    refused(program("loss"), "computes a loss of all tokens", last=True)
    training = build(spec.model_copy(update={"dropout": 0.1}), training=True)
    refused(training, "dropout at .*: it is for training; build without dropout")
    refused(parse(str(program()).replace("window=3", "causal=False")), "attention at .*: it is not causal")
    refused(parse("def f(x: f64[b, m]):\n    y = silu(x)\n    return y\n"), "m is a size of its inputs already")


ROWS = [
    [[9], [0], [4]],
    [[5, 1, 3], [0, 2, 0], [3, 0, 1]],
    [[1] * 9, [0] * 9, [1, 0] * 4 + [0]],
]  # tokens of a row, call by call


@pytest.mark.parametrize("counts", ROWS, ids=str)
@pytest.mark.parametrize("options", ["rows=true", "rows=true paged=true", "last=true rows=true paged=true"])
def test_rows_packed_into_one_go_their_own_ways(counts: list[list[int]], options: str):
    """What each row says in pieces, packed with others, is what it says alone and at once."""
    packed = build(load_spec(SPEC), dtype="f64", packed=True)
    cached = Pipeline.parse(f"with-cache{{{options}}},{DEFAULT}").run(packed, verify="types")
    given, params = sample()
    rows = [given[0], given[0], given[1, :4]]
    sizes = {"n": 3, "m": ROOM, "w3": 3 - 1 + 9, "pages": 9, "page": 4}
    states = [
        torch.full([value(d, sizes) for d in s.type.shape], 0.0 if "state" in s.kind else 1e3).double()
        for s in cache_states(cached)
    ]
    at, found = [0, 0, 0], [list[torch.Tensor]() for _ in rows]
    for call in zip(*counts, strict=True):
        own = [row[a : a + n] for row, a, n in zip(rows, at, call, strict=True)]
        where = [
            torch.arange(a, a + n) + 12 * r for r, (a, n) in enumerate(zip(at, call, strict=True))
        ]  # pages 3 r, 3 r + 1, ...
        told = [torch.cat(where)[None], torch.arange(9).view(3, 3)] if "paged" in options else []
        cu = torch.tensor([0, *call]).cumsum(0)
        y, *states = evaluate(cached, torch.cat(own)[None], cu, *told, torch.tensor(at), *states, params=params)
        parts = y[0].split([1] * 3 if "last" in options else call)
        for into, part, n in zip(found, parts, call, strict=True):
            into.append(part if n else part[:0])
        at = [a + n for a, n in zip(at, call, strict=True)]
    for i, (row, parts, a) in enumerate(zip(rows, found, at, strict=True)):
        if a:
            whole = evaluate(program(), row[None, :a], params=params)[0]
            ends = torch.tensor([c[i] for c in zip(*counts, strict=True) if c[i]]).cumsum(0) - 1
            torch.testing.assert_close(torch.cat(parts), whole[ends] if "last" in options else whole, rtol=1e-11, atol=1e-12)


def test_what_rows_cannot_have():
    packed = build(load_spec(SPEC), dtype="f64", packed=True)
    with pytest.raises(PassError, match=r"it is packed \(cu\); one `at` is for rows that are equally long"):
        with_cache(packed)
    kept = with_cache(program(), rows=True, last=True)[0]
    assert [s.kind for s in cache_states(kept)] == [s.kind for s in cache_states(with_cache(program())[0])]
    assert str(kept.outputs[0].type) == "f64[b, 1, 61]"


def test_last_needs_a_head_of_its_own():
    flat = parse("def f(x: f64[b, s, 6]):\n    y = silu(x)\n    return y\n")
    refused(flat, "ends in no head of its own; last=true needs a last layer", last=True)
    mixes = parse("""
def f(x: f64[b, s, 6]):
    y = mix(x, params='layers.0')
    return y

@layer
def mix(x: f64[b, s, 6], *, c: f64[6, 4] = normal(0.5)):
    y, final = causal_conv1d(x, c)
    return y
""")
    refused(mixes, "ends in no head of its own", last=True)


def test_a_program_without_states_has_none_to_list():
    with pytest.raises(PassError, match="has no input `at`: it is not a cached program; run with-cache on it first"):
        cache_states(program())
