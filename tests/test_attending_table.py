"""Which attentions and convolutions generated kernels run, what a listing sees of them, and whole models through them."""

from __future__ import annotations

import plait
import pytest
import torch
from plait.frontends import load_spec, shrink
from plait.ir import Node, parse
from plait.lowering.attending.jobs import launches
from plait.lowering.gpu import TARGETS
from plait.lowering.table import choose


def nodes(lines: str, dtype: str = "bf16") -> list[Node]:
    """Nodes over every operand that one may have at hand."""
    inputs = f"q: {dtype}[b, s, 8, 64], k: {dtype}[b, s, 2, 64], v: {dtype}[b, s, 2, 64], w: {dtype}[b, s, 2, 32], "
    inputs += (
        f"long: {dtype}[b, m, 2, 64], sinks: {dtype}[8], cu: i64[n+1], at: i64[()], x: {dtype}[1, s, 64], taps: {dtype}[64, 4]"
    )
    body = "".join(f"    {line.strip()}\n" for line in lines.strip().splitlines())
    return list(parse(f"def f({inputs}):\n{body}    return y").nodes)


CHOICES = {
    "y = attention(q, k, v)": ("device.attention", "SDPA: its own kernels"),
    "y = attention(q, long, long, causal=False)": ("device.attention", "SDPA: its own kernels"),
    "y = attention(q, k, v, window=16)": ("attending.attention", "no kernel of its own for a window"),
    "y = attention(q, k, v, sinks, softcap=3.0)": ("attending.attention", "for a softcap and sinks"),
    "y = attention(q, k, v, cu=cu)": ("attending.attention", "for packed segments"),
    "y = attention(q, long, long, at=at)": ("attending.attention", "for keys before the first query"),
    "y = attention(q, long, long)": ("attending.attention", "for keys before the first query"),
    "y = attention(q, k, w)": ("attending.attention", "for values of other widths than keys"),
    "y, last = causal_conv1d(x, taps, cu=cu)": ("attending.causal_conv1d", "generated Triton where no row kernel is"),
}


@pytest.mark.parametrize("text", CHOICES)
def test_the_table_says_what_runs_and_why(text: str) -> None:
    (node,) = nodes(text)
    _, runs, why = choose(node, "cuda")
    wanted, reason = CHOICES[text]
    assert runs == wanted and reason in why
    assert choose(node, "interpreter")[1:] == (f"attending.{node.op.name}", "generated Triton, interpreted")
    assert bool(launches(node, halves=("forward",))) == runs.startswith("attending")


def test_other_dtypes_are_torch_code_and_the_table_says_so() -> None:
    (node,) = nodes("y = attention(q, k, v, window=16)", "f64")
    assert choose(node, "cuda")[1:] == ("device.attention", "SDPA, or by hand: products of f64 are no tensor core's")
    (full,) = nodes("y = attention(q, k, v, window=16)", "f32")
    assert choose(full, "cuda")[1] == "attending.attention" and len(launches(full)) == 6
    text = "def f(q: f32[b, s, 8, 65], k: f32[b, s, 2, 65]):\n    y = attention(q, k, k, window=16)\n    return y"
    assert "heads of 65 and 65 channels; a program's registers take 1 to 64 of f32" in choose(parse(text).nodes[0], "cuda")[2]
    (wide,) = nodes("y, last = causal_conv1d(x, taps, cu=cu)", "f64")
    assert not launches(node) and not launches(wide)


def test_a_listing_sees_every_half() -> None:
    attention, conv = nodes("z = attention(q, k, v, window=16)\ny, last = causal_conv1d(x, taps, cu=cu, act='silu')")
    found = {
        half: [x.name.split("_")[0] for x in launches(attention, halves=(half,))] for half in ("forward", "backward", "step")
    }
    assert found == {"forward": ["attend"], "backward": ["queries", "keys", "values"], "step": ["split", "join"]}
    assert [x.name.split("_")[0] for x in launches(conv)] == ["conv", "final", "taps", "spread"]
    for target in TARGETS:
        for launch in launches(attention, target):
            assert launch.name in launch.text and launch.programs and launch.job.target == target


@pytest.mark.parametrize("name", ["qwen3-next-80b-a3b-tiny", "nemotron-h-8b-tiny"])
def test_packed_segments_of_a_model_run_by_these_kernels(name: str) -> None:
    spec = shrink(load_spec(name))
    model, wanted = (plait.compile(spec, dtype="f32", target=t, jit=False, mode="infer") for t in ("interpreter", "reference"))
    model.load_from(wanted)
    tokens, cu = torch.randint(0, model.vocab, (1, 12)), torch.tensor([0, 1, 1, 8, 12])
    torch.testing.assert_close(model(tokens, cu), wanted(tokens, cu), rtol=1e-4, atol=1e-4)
