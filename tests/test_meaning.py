"""What the mixers mean, against loops over numpy written here from the papers' equations."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from plait.ir import OPS, TypeMismatch, ops
from plait.ir.ops import FAMILY

Array = np.ndarray[Any, np.dtype[np.float64]]
RNG = np.random.default_rng


def close(got: torch.Tensor, want: Array, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=tolerance, atol=tolerance)


def tensors(*xs: Array | None) -> list[torch.Tensor | None]:
    return [None if x is None else torch.from_numpy(x) for x in xs]


# -- attention --------------------------------------------------------------------------------


def attend(
    q: Array, k: Array, v: Array, sinks: Array | None, starts: list[int] | None, at: int | None,
    causal: bool, window: int, cap: float, scale: float,
) -> Array:  # fmt: skip
    """One query, one head, one key at a time."""
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    out = np.zeros((b, t, h, v.shape[3]))
    for n, i, a in np.ndindex(b, t, h):
        place, head, weights, total = i + (s - t if at is None else at), a // (h // g), np.zeros(s), 0.0
        for j in range(s):
            hidden = (
                (causal and j > place) or (window and j <= place - window) or (starts is not None and starts[j] != starts[i])
            )
            logit = float(q[n, i, a] @ k[n, j, head]) * scale
            logit = cap * math.tanh(logit / cap) if cap else logit
            weights[j] = 0.0 if hidden else math.exp(logit)
            total += weights[j]
        total += math.exp(sinks[a]) if sinks is not None else 0.0
        out[n, i, a] = sum(weights[j] / total * v[n, j, head] for j in range(s))
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 3), (4, 1)])
@pytest.mark.parametrize(
    ("window", "cap", "scale", "with_sinks"), [(0, 0.0, None, False), (3, 2.0, 0.3, True), (1, 0.0, None, True)]
)
def test_attention(
    causal: bool, heads: int, groups: int, window: int, cap: float, scale: float | None, with_sinks: bool
) -> None:
    r = RNG(heads + window)
    q, k, v = r.normal(size=(2, 7, heads, 5)), r.normal(size=(2, 7, groups, 5)), r.normal(size=(2, 7, groups, 3))
    sinks = r.normal(size=heads) if with_sinks else None
    got = OPS["attention"].reference(
        *tensors(q, k, v, sinks), None, None, causal=causal, window=window, softcap=cap, scale=scale
    )
    close(got, attend(q, k, v, sinks, None, None, causal, window, cap, 5**-0.5 if scale is None else scale))


@pytest.mark.parametrize("borders", [[0, 1, 1, 6, 9], [0, 9], [0, 4, 9]])
@pytest.mark.parametrize("window", [0, 2])
def test_packed_attention_sees_one_segment(borders: list[int], window: int) -> None:
    r = RNG(1)
    q, k, v = r.normal(size=(1, 9, 4, 3)), r.normal(size=(1, 9, 2, 3)), r.normal(size=(1, 9, 2, 5))
    got = OPS["attention"].reference(*tensors(q, k, v, None), torch.tensor(borders), None, window=window)
    starts = [max(x for x in borders if x <= j) for j in range(9)]
    close(got, attend(q, k, v, None, starts, None, True, window, 0.0, 3**-0.5))
    runs = [[torch.from_numpy(x[:, a:b]) for x in (q, k, v)] for a, b in itertools.pairwise(borders) if b > a]
    close(got, np.concatenate([OPS["attention"].reference(*run, window=window).numpy() for run in runs], 1))


@pytest.mark.parametrize("at", [None, 0, 4])
def test_attention_over_a_cache_starts_at_a_place(at: int | None) -> None:
    r = RNG(2)
    q, k, v = r.normal(size=(2, 3, 2, 3)), r.normal(size=(2, 8, 2, 3)), r.normal(size=(2, 8, 2, 3))
    place = None if at is None else torch.tensor(at)
    close(
        OPS["attention"].reference(*tensors(q, k, v, None), None, place), attend(q, k, v, None, None, at, True, 0, 0.0, 3**-0.5)
    )


# -- short convolution --------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(("length", "borders"), [(1, None), (2, None), (9, None), (9, [0, 1, 1, 3, 9]), (3, [0, 3])])
@pytest.mark.parametrize("carried", [True, False])
def test_causal_conv1d(act: str, width: int, length: int, borders: list[int] | None, carried: bool) -> None:
    r, batch = RNG(width), 1 if borders else 2
    runs = [(0, a, b) for a, b in itertools.pairwise(borders)] if borders else [(n, 0, length) for n in range(batch)]
    x, w, bias = r.normal(size=(batch, length, 3)), r.normal(size=(3, width)), r.normal(size=3)
    state = r.normal(size=(len(runs), 3, width - 1)) if carried else None
    want, final = np.zeros_like(x), np.zeros((len(runs), 3, width - 1))
    for n, (row, start, end) in enumerate(runs):
        for c in range(3):
            line = [*(state[n, c] if state is not None else [0.0] * (width - 1)), *x[row, start:end, c]]
            for t in range(end - start):
                y = bias[c] + sum(w[c, i] * line[t + i] for i in range(width))
                want[row, start + t, c] = y / (1 + math.exp(-y)) if act == "silu" else y
            final[n, c] = line[len(line) - width + 1 :]
    cu = torch.tensor(borders) if borders else None
    y, last = OPS["causal_conv1d"].reference(*tensors(x, w, bias, state), cu, act=act)
    close(y, want)
    close(last, final)


# -- recurrences --------------------------------------------------------------------------------

NAMES = [op.name for op in FAMILY]


def step(name: str, s: Array, k: Array, v: Array, decay: Any, beta: float) -> Array:
    """One token of one head; S is [k, v], as in each layer's paper."""
    eye = np.eye(len(k))
    match name:
        case "gated_delta_rule":
            return math.exp(decay) * (eye - beta * np.outer(k, k)) @ s + beta * np.outer(k, v)
        case "delta_rule":
            return (eye - beta * np.outer(k, k)) @ s + beta * np.outer(k, v)
        case "kimi_delta_attention":
            return (eye - beta * np.outer(k, k)) @ np.diag(np.exp(decay)) @ s + beta * np.outer(k, v)
        case "ssd":
            return math.exp(decay) * s + beta * np.outer(k, v)
        case "gated_linear_attention":
            return np.diag(np.exp(decay)) @ s + np.outer(k, v)
        case _:
            return math.exp(decay) * s + np.outer(k, v)


def draw(name: str, batch: int, length: int, groups: int, repeat: int) -> dict[str, Array]:
    """Operands by name, as the signature orders them."""
    r, heads = RNG(length), groups * repeat
    traits = next(t for o, t in FAMILY.items() if o.name == name)
    shape = {"head": (batch, length, heads), "channel": (batch, length, heads, 3), "constant": (heads,)}
    k = r.normal(size=(batch, length, groups, 3))
    xs = {
        "q": r.normal(size=(batch, length, groups, 3)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": r.normal(size=(batch, length, heads, 5)),
    }
    if traits.decay != "none":
        xs["slope" if traits.decay == "constant" else "decay"] = -np.abs(r.normal(size=shape[traits.decay]))
    return {**xs, "beta": r.uniform(0.1, 1.9, size=(batch, length, heads))} if traits.beta else xs


def recur(
    name: str, xs: dict[str, Array], state: Array | None, runs: list[tuple[int, int, int]], scale: float
) -> tuple[Array, Array]:
    heads, repeat = xs["v"].shape[2], xs["v"].shape[2] // xs["q"].shape[2]
    out, finals = np.zeros_like(xs["v"]), np.zeros((len(runs), heads, 3, 5))
    for (n, (row, start, end)), h in ((run, h) for run in enumerate(runs) for h in range(heads)):
        s = np.zeros((3, 5)) if state is None else state[n, h]
        for t in range(start, end):
            decay = xs["slope"][h] if "slope" in xs else xs["decay"][row, t, h] if "decay" in xs else 0.0
            beta = xs["beta"][row, t, h] if "beta" in xs else 1.0
            s = step(name, s, xs["k"][row, t, h // repeat], xs["v"][row, t, h], decay, beta)
            out[row, t, h] = scale * s.T @ xs["q"][row, t, h // repeat]
        finals[n, h] = s
    return out, finals


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize(("groups", "repeat"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("carried", [True, False])
def test_a_recurrence(name: str, length: int, groups: int, repeat: int, carried: bool) -> None:
    xs = draw(name, 2, length, groups, repeat)
    state = RNG(3).normal(size=(2, groups * repeat, 3, 5)) if carried else None
    got = OPS[name].reference(*tensors(*xs.values(), state), None, scale=0.7)
    for a, b in zip(got, recur(name, xs, state, [(0, 0, length), (1, 0, length)], 0.7), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("carried", [True, False])
def test_a_packed_recurrence_starts_anew(name: str, carried: bool) -> None:
    xs, borders = draw(name, 1, 9, 2, 2), [0, 1, 1, 4, 9]
    state = RNG(3).normal(size=(4, 4, 3, 5)) if carried else None
    got = OPS[name].reference(*tensors(*xs.values(), state), torch.tensor(borders), scale=1.0)
    runs = [(0, a, b) for a, b in itertools.pairwise(borders)]
    for a, b in zip(got, recur(name, xs, state, runs, 1.0), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_carries_a_sequence_over(name: str) -> None:
    """Two halves, the first one's final state given to the second, are the whole; a half may be empty."""
    xs, op = draw(name, 2, 9, 2, 2), OPS[name]
    whole, last = op.reference(*tensors(*xs.values()), scale=0.5)
    for at in (0, 4, 9):
        halves = [[x if key == "slope" else x[:, part] for key, x in xs.items()] for part in (slice(0, at), slice(at, 9))]
        first, middle = op.reference(*tensors(*halves[0]), scale=0.5)
        second, final = op.reference(*tensors(*halves[1]), middle, scale=0.5)
        close(torch.cat([first, second], 1), whole.numpy())
        close(final, last.numpy())


@pytest.mark.parametrize("borders", [[1, 9], [0, 4], [0, 5, 3, 9]])
def test_borders_that_are_none_are_refused(borders: list[int]) -> None:
    xs = draw("ssd", 1, 9, 1, 1)
    with pytest.raises(TypeMismatch, match="must rise from 0 to 9"):
        OPS["ssd"].reference(*tensors(*xs.values()), None, torch.tensor(borders))


def test_dropout_keeps_the_share_it_says_and_scales_it_up() -> None:
    x = torch.ones(300, 400, dtype=torch.float64)
    for p in (0.1, 0.5, 0.9):
        y = ops.dropout.reference(x, torch.tensor(5), p=p)
        assert abs(float((y == 0).double().mean()) - p) < 0.005
        assert abs(float(y.mean()) - 1) < 0.03
        assert set(y.unique().tolist()) == {0.0, 1 / (1 - p)}


def test_forked_seeds_drop_different_elements() -> None:
    x, seed = torch.ones(200, 300, dtype=torch.float64), torch.tensor(5)
    kept = [ops.dropout.reference(x, ops.fork_seed.reference(seed, stream=i), p=0.5) > 0 for i in range(4)]
    for i, a in enumerate(kept):
        assert torch.equal(a, ops.dropout.reference(x, ops.fork_seed.reference(seed, stream=i), p=0.5) > 0)
        for b in kept[:i]:
            assert abs(float((a == b).double().mean()) - 0.5) < 0.02
