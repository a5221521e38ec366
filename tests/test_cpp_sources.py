"""The C++ libraries that a graph is said to call are those that running it asks for."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL

import pytest
import torch
from plait.api import compile, program
from plait.frontends import build, load_spec
from plait.ir import DTYPES, parse
from plait.lowering import cpp, cpp_ops, lower
from plait.lowering.cpp import conv, recurrence
from plait.lowering.cpp.build import library as build_library
from plait.lowering.libraries import libraries
from plait.passes import DEFAULT, Pipeline

HEAD = (
    "q: {0}[2, 5, 2, 24], v: {0}[2, 5, 4, {1}], g: {0}[2, 5, 4], c: {0}[2, 5, 4, 24], s: {0}[4], "
    "x: {0}[2, 5, 6], w: {0}[6, {2}]"
)
BODY = """
    a, a1 = gated_delta_rule(q, q, v, g, g)
    b, b1 = delta_rule(q, q, v, g)
    d, d1 = kimi_delta_attention(q, q, v, c, g)
    e, e1 = ssd(q, q, v, g, g)
    f, f1 = gated_linear_attention(q, q, v, c)
    h, h1 = retention(q, q, v, s)
    i = gated_delta_final(q, v, g, g)
    j = kimi_delta_final(q, v, c, g)
    y, y1 = causal_conv1d(x, w, act='silu')
    z, z1 = causal_conv1d(x, w)
    return a, b, d, e, f, h, i, j, y, z
"""
RULES = [f"recurrence_{update}_{decay}_32x48" for update in ("delta", "additive") for decay in ("head", "channel")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Name -> text of all that is asked for; none is built."""
    found = dict[str, str]()

    def note(text: str, name: str) -> None:
        found[name] = text

    def uncached(function: Callable[..., CDLL | None]) -> Callable[..., CDLL | None]:
        return function.__wrapped__  # type: ignore[attr-defined] # what functools.cache keeps

    monkeypatch.setattr(recurrence, "built", note)
    monkeypatch.setattr(recurrence, "library", uncached(recurrence.library))
    monkeypatch.setattr(conv, "library", note)
    monkeypatch.setattr(conv, "_library", uncached(conv._library))  # pyright: ignore[reportPrivateUsage]
    return found


@pytest.mark.parametrize("dtype,out,taps", [("f32", 40, 3), ("bf16", 40, 3), ("f64", 40, 3), ("f32", 272, 9), ("bf16", 48, 1)])
def test_what_is_named_is_what_a_run_asks_for(dtype: str, out: int, taps: int, asked: dict[str, str]) -> None:
    graph = parse(f"def every({HEAD.format(dtype, out, taps)}):{BODY}")
    named = cpp.sources(graph)
    inputs = [torch.zeros([int(n) for n in v.type.shape], dtype=DTYPES[dtype]) for v in graph.inputs]
    with torch.no_grad():
        lower(graph).entry(*inputs)
    assert named == asked
    assert ([*named][:4] == RULES) == (dtype != "f64" and out <= recurrence.WIDEST)


def test_a_model_names_the_libraries_of_its_layers() -> None:
    graph = Pipeline.parse(DEFAULT).run(build(load_spec("qwen3-next-80b-a3b"), task="loss"))
    assert [*cpp.sources(graph)] == ["conv_4_silu", "recurrence_delta_head_128x128", "attention", "softmax"]
    assert [*cpp.sources(build(load_spec("llama-3-8b"), task="loss"))] == ["attention", "softmax"]
    assert not cpp.sources(parse("def f(q: f64[2, 5, 2, 24]):\n    y = attention(q, q, q)\n    return y\n"))


@pytest.mark.skipif(cpp.compiler() is None, reason="there is no C++ compiler")
def test_row_kernels_that_are_named_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a model, kernel by kernel; a cached program's step is named too."""
    asked = set[str]()

    def note(text: str, name: str) -> CDLL | None:
        asked.add(text)
        return build_library(text, name)

    monkeypatch.setattr(cpp_ops, "library", note)
    cpp_ops._built.cache_clear()  # pyright: ignore[reportPrivateUsage]
    compile("llama-3-8b-tiny", dtype="f32", jit=False).loss(torch.arange(18).view(2, 9)).backward()
    named = libraries(Pipeline.parse(DEFAULT).run(program("llama-3-8b-tiny", task="loss", dtype="f32")))
    assert asked == {text for name, text in named.items() if name.startswith("rows_")} and len(asked) > 6
    assert "step" not in named and "step" in libraries(program("llama-3-8b-tiny", task="cached"))
