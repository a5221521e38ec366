"""Generation: with states, ragged, packed, in chunks, in pages, tried and taken back, it says what the whole program says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import plait
import pytest
import torch
from plait.frontends.presets import PRESETS
from plait.ir import DataError
from plait.runtime import CompiledModel, Variant
from plait.runtime.caches import Cache

Tensor = torch.Tensor
TINY = [*sorted(p.name for p in PRESETS if p.name.endswith("-tiny")), "demo"]
WINDOWS: dict[str, Any] = {
    "name": "windows", "vocab": 61, "hidden": 20, "blocks": ["gdn", "local", "mlp", "attention", "local"],
    "gdn": {"key_heads": 1, "value_heads": 2, "key_dim": 5, "value_dim": 7}, "mlp": {"width": 13},
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "rope": {"theta": 100.0}},
    "kinds": {"local": {"kind": "attention", "heads": 3, "head_dim": 5, "window": 3, "sinks": True}},
}  # fmt: skip
LEARNED = WINDOWS | {"name": "learned", "blocks": ["attention", "mlp"], "learned_positions": True, "max_length": 12}
LEARNED["attention"] = {"heads": 4, "head_dim": 5, "rope": None}
LENGTHS = (5, 1, 8)
SAID = dict[tuple[Any, ...], list[int]]()  # by model and prompt
EMPTY, ONE = torch.empty(0, dtype=torch.int64), torch.tensor([1])


@cache
def model(name: str = "windows") -> CompiledModel:
    spec: Any = {"windows": WINDOWS, "learned": LEARNED}.get(name, name)
    return plait.compile(spec, dtype="f64", mode="infer", jit=False, seed=5)


def prompts(of: CompiledModel, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(of.vocab, (n,), generator=rng) for n in lengths]


def greedy(of: CompiledModel, row: Tensor, count: int) -> Tensor:
    """The uncached program, all tokens anew for each; what it has said once is kept."""
    known = SAID.setdefault((of, *row.tolist()), [])
    while len(known) < count:
        known.append(int(of(torch.cat([row, torch.tensor(known, dtype=torch.int64)])[None])[0, -1].argmax()))
    return torch.cat([row, torch.tensor(known[:count], dtype=torch.int64)])


def alone(of: CompiledModel, rows: Sequence[Tensor], count: int) -> list[Tensor]:
    return [greedy(of, row, count) for row in rows]


def padded(rows: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    tokens, mask = torch.full((len(rows), longest), 3), torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        own = slice(longest - len(row), longest) if left else slice(0, len(row))
        tokens[i, own], mask[i, own] = row, 1
    return tokens, mask


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def filled(of: CompiledModel, rows: Sequence[Tensor], **how: int) -> Cache:
    made = of.cache(len(rows), **how)
    made.add(rows)
    made.read()
    return made


# -- the law ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TINY, "windows", "learned"])
def test_rows_of_any_lengths_say_what_each_says_alone(name: str) -> None:
    of = model(name)
    rows = prompts(of)
    want = alone(of, rows, 3)
    assert same(of.generate(rows, 3), want)
    assert same(of.generate(rows, 3, prefill_chunk=3), want)
    assert torch.equal(of.generate(rows[2][None], 3, prefill_chunk=3)[0], want[2])
    tokens, mask = padded(rows, left=True)
    assert same([*of.generate(tokens, 3, mask=mask)[:, -3:]], [w[-3:] for w in want])


PAGED = [(name, {"page": 3}) for name in ("windows", "llama-3-8b-tiny", "demo")]


@pytest.mark.parametrize(("name", "how"), [*((name, {"page": 0}) for name in [*TINY, "windows"]), *PAGED], ids=str)
def test_tried_tokens_that_are_taken_back_have_never_been(name: str, how: dict[str, int]) -> None:
    of = model(name)
    rows, tried = prompts(of), torch.stack(prompts(of, (4, 4, 4), seed=1))
    whole = [of(torch.cat([row, more])[None])[0, len(row) - 1 :] for row, more in zip(rows, tried, strict=True)]
    kept = filled(of, rows, **how, room=2)
    other = kept.fork()
    torch.testing.assert_close(of.verify(kept, tried), torch.stack([w[1:] for w in whole]), rtol=1e-10, atol=1e-12)
    kept.rollback([2, 0, 4])
    assert kept.length.tolist() == [7, 1, 12] and other.length.tolist() == [5, 1, 8]
    after = torch.tensor([[7], [8], [9]])
    want = [of(torch.cat([r, t[:n], a])[None])[0, -1] for r, t, n, a in zip(rows, tried, (2, 0, 4), after, strict=True)]
    torch.testing.assert_close(of.verify(kept, after)[:, 0], torch.stack(want), rtol=1e-10, atol=1e-12)
    # The fork goes on from where it was made.
    torch.testing.assert_close(of.verify(other, tried), torch.stack([w[1:] for w in whole]), rtol=1e-10, atol=1e-12)
    other.rollback(3)
    assert other.length.tolist() == [8, 4, 11]


@pytest.mark.parametrize("how", [{"page": 0}, {"chunk": 2, "page": 3}, {"room": 30}], ids=str)
@pytest.mark.parametrize("name", ["demo", "windows"])
def test_a_cache_goes_on_turn_by_turn(name: str, how: dict[str, int]) -> None:
    of = model(name)
    rows, kept = prompts(of), of.cache(3, **how)
    said = of.generate(rows, 5, cache=kept)
    assert same(said, alone(of, rows, 5)) and kept.length.tolist() == [10, 6, 13]
    fork = kept.fork()
    more = prompts(of, (2, 7, 1), seed=2)
    joined = [torch.cat(pair) for pair in zip(said, more, strict=True)]
    want = [w[len(s) :] for w, s in zip(alone(of, joined, 6), said, strict=True)]
    assert same(of.generate(more, 6, cache=kept, prefill_chunk=2), want)
    assert same(of.generate(more, 6, cache=fork), want)


def test_rows_that_are_done_go_on_in_the_next_turn() -> None:
    """A cache holds what its rows said, not what others waited for."""
    of = model("demo")
    rows = prompts(of)
    free = alone(of, rows, 6)
    stop = [[int(free[0][5])], [], [int(free[2][10])]]  # after one token, never, after three at most
    kept = of.cache(3)
    said = of.generate(rows, 6, cache=kept, stop=stop)
    assert len(said[0]) == 6 and len(said[1]) == 7 and len(said[2]) <= 11
    assert kept.length.tolist() == [len(s) for s in said]
    more = prompts(of, (2, 2, 2), seed=3)
    want = [greedy(of, torch.cat(pair), 3)[-5:] for pair in zip(said, more, strict=True)]
    assert same(of.generate(more, 3, cache=kept), want)


def test_a_stream_that_is_left_keeps_what_it_gave() -> None:
    of = model("demo")
    (row,), kept = prompts(of, (4,)), of.cache(1)
    want = greedy(of, row, 5)
    stream = of.stream([row], 9, cache=kept)
    got = [int(next(stream)) for _ in range(3)]
    stream.close()
    assert got == want[4:7].tolist() and kept.length.tolist() == [7]
    assert torch.equal(of.generate([row[:0]], 2, cache=kept)[0], want[7:])


def test_a_window_keeps_a_ring() -> None:
    of = model()
    kept = of.cache(2, room=40, chunk=4)
    rings = [s.shape[1] for s, w in zip(kept.states, kept.where, strict=True) if w == "w3"]
    assert rings == [6, 6, 6, 6]  # window - 1 + chunk
    rows = prompts(of, (23, 9))
    kept.add(rows)
    torch.testing.assert_close(kept.read(), torch.stack([of(r[None])[0, -1] for r in rows]), rtol=1e-10, atol=1e-12)
    with pytest.raises(DataError, match="5 tokens are tried at once; a cache with windows has chunk 4"):
        of.verify(kept, torch.zeros(2, 5, dtype=torch.int64))


# -- padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_padding_changes_no_logit(name: str, left: bool) -> None:
    of = model(name)
    rows = prompts(of)
    tokens, mask = padded(rows, left)
    got = of(tokens, mask=mask)
    for row, own, real in zip(rows, got, mask.bool(), strict=True):
        torch.testing.assert_close(own[real], of(row[None])[0], rtol=1e-10, atol=1e-12)
        assert not own[~real].any()


def test_padding_changes_no_loss_and_no_gradient() -> None:
    of = plait.compile(WINDOWS, dtype="f64", jit=False, seed=5)
    rows = prompts(of)
    tokens, mask = padded(rows, left=True)
    of.loss(torch.cat(rows)[None], cu=torch.tensor([0, 5, 6, 14])).backward()
    want = {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}
    of.zero_grad()
    loss = of.loss(tokens, mask=mask)
    loss.backward()
    for name, p in of.named_parameters():
        torch.testing.assert_close(p.grad, want[name])
    labels = torch.where(mask.bool(), tokens.roll(-1, 1), -100)
    labels[:, -1] = -100
    torch.testing.assert_close(of(tokens, labels=labels, mask=mask), loss)


# -- rings and pages ---------------------------------------------------------------------------


def test_pages_are_shared_until_one_writes_and_given_back() -> None:
    of = model("llama-3-8b-tiny")
    kept = filled(of, prompts(of, (9,)), page=4)
    assert kept.held is not None
    pool = kept.held.pool
    assert [pool.users[p] for p in kept.held.rows[0]] == [1, 1, 1]
    fork = kept.fork()
    assert fork.held is not None and [pool.users[p] for p in kept.held.rows[0]] == [2, 2, 2]
    fork.add([torch.tensor([1])])
    fork.read()
    assert [pool.users[p] for p in kept.held.rows[0]] == [2, 2, 1] and fork.held.rows[0][2] != kept.held.rows[0][2]
    del fork
    assert [pool.users[p] for p in kept.held.rows[0]] == [1, 1, 1] and sum(pool.users) == 3


def test_nothing_new_is_the_prompt_and_waits() -> None:
    of, kept = model(), model().cache(2)
    rows = prompts(of, (3, 2))
    assert same(of.generate(rows, 0, cache=kept), rows) and kept.length.tolist() == [3, 2]
    assert same(of.generate([EMPTY, EMPTY], 2, cache=kept), [w[-2:] for w in alone(of, rows, 2)])


def test_programs_are_those_that_were_asked_for() -> None:
    """Equal lengths run the program with one length, and the head reads last tokens alone; only what is tried needs all."""
    of = plait.compile(WINDOWS, dtype="f64", mode="infer", jit=False)
    of.generate(torch.zeros(2, 3, dtype=torch.int64), 2)
    assert set(of._runners) == {Variant("cached", last=True)}
    of.generate(prompts(of), 2)
    known = {Variant("cached", last=True), Variant("rows", last=True), Variant("rows", packed=True, last=True)}
    assert set(of._runners) == known
    of.verify(of.cache(1), ONE[None])
    assert set(of._runners) == {*known, Variant("rows")}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_long_text_keeps_rings_of_its_windows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache too, what a layer cannot look back to is not kept."""
    of, seen = model(), list[list[int]]()
    step = of._step

    def watched(variant: Variant, *inputs: Tensor) -> tuple[Tensor, ...]:
        seen.append([x.shape[1] for x in inputs[2:] if x.dim() == 4 and x.shape[2:] == (3, 5)])
        return step(variant, *inputs)

    monkeypatch.setattr(of, "_step", watched)
    tokens = torch.stack(prompts(of, (23,) * rows))
    got = of.generate(tokens, 9, prefill_chunk=4)
    assert len(seen) == 6 + 8 and all(rings == [3 - 1 + 4] * 4 for rings in seen)
    monkeypatch.undo()
    assert same([*got], alone(of, [*tokens], 9))


def test_a_stream_that_is_not_read_leaves_its_prompt() -> None:
    of = model("demo")
    (row,), kept = prompts(of, (4,)), of.cache(1)
    stream = of.stream([row], 9, cache=kept)
    stream.close()  # type: ignore[attr-defined] # a generator
    assert kept.length.tolist() == [4] and torch.equal(of.generate([row[:0]], 2, cache=kept)[0], greedy(of, row, 2)[4:])


def test_what_has_nothing_waiting_says_nothing() -> None:
    of, (row,) = model(), prompts(model(), (5,))
    kept = of.cache(2)
    kept.add([row, row[:0]])
    got = kept.read(chunk=2)
    torch.testing.assert_close(got[0], of(row[None])[0, -1], rtol=1e-10, atol=1e-12)
    assert not got[1].any() and kept.lengths == [5, 0]


def test_a_table_has_the_room_that_was_asked_for() -> None:
    """So that no step on the way meets a table of another size."""
    of = model("llama-3-8b-tiny")
    kept, widths = of.cache(1, room=40, page=4), set[tuple[int, ...]]()
    for token in range(1, 41):
        kept.add([torch.tensor([token])])
        kept.read()
        assert kept.held is not None
        widths.add(tuple(kept.held.table.shape))
    assert widths == {(1, 10)}
    kept.add([ONE])
    kept.read()
    assert kept.held is not None and kept.held.table.shape == (1, 20)


def test_a_pool_grows_by_pages_that_stay() -> None:
    of = model("llama-3-8b-tiny")
    (row,) = prompts(of, (33,))
    kept, found = of.cache(1, page=2), list[Tensor]()
    for start, end in pairwise([0, 1, 2, 9, 33]):
        kept.add([row[start:end]])
        found.append(kept.read()[0])
    torch.testing.assert_close(torch.stack(found), of(row[None])[0, [0, 1, 8, 32]], rtol=1e-10, atol=1e-12)
