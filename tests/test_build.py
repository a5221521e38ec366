"""From specs to IR: sizes agree with the count, programs mean what the layers' definitions say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plait.frontends import PRESETS, ModelSpec, build, load_spec, parameter_count, shrink
from plait.ir import evaluate, parameters, parse
from plait.ir.sizes import value
from plait.runtime.module import initial

NAMES = [p.name for p in PRESETS]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_count(name: str) -> None:
    spec = load_spec(name)
    total = 0
    for type_, _ in parameters(build(spec)).values():
        total += type_.count({})
    assert total == parameter_count(spec)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"task": "loss"}, {"packed": True}, {"task": "loss", "packed": True, "training": True}]
)
def test_programs_print_and_parse_back(name: str, options: dict[str, object]) -> None:
    graph = build(load_spec(name), **options)  # type: ignore[arg-type] # a table of options
    assert parse(str(graph)) == graph
    assert str(parse(str(graph))) == str(graph)


def test_distinct_layers_are_few_and_calls_are_many() -> None:
    graph = build(load_spec("qwen3-next-80b-a3b"))
    assert [g.name for g in graph.layers] == ["gdn", "moe", "self_attention", "head"]
    assert sum(n.callee is not None for n in graph.nodes) == 97


def weights(spec: ModelSpec, **options: object) -> dict[str, torch.Tensor]:
    made = initial(build(spec, dtype="f64"), seed=1)
    return {k: v.double() + 0.1 * torch.randn(v.shape, dtype=torch.float64) for k, v in made.items()}


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("-tiny") or n == "demo"])
def test_packing_is_running_the_segments_apart(name: str) -> None:
    spec = shrink(load_spec(name))
    params = weights(spec)
    tokens, cu = torch.randint(0, spec.vocab, (1, 12)), torch.tensor([0, 5, 5, 12])
    packed = evaluate(build(spec, dtype="f64", packed=True), tokens, cu, params=params)
    alone = [evaluate(build(spec, dtype="f64"), tokens[:, a:b], params=params) for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("-tiny")])
def test_no_token_sees_a_later_one(name: str) -> None:
    spec = shrink(load_spec(name))
    params, graph = weights(spec), build(spec, dtype="f64")
    tokens = torch.randint(0, spec.vocab, (2, 9))
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 1) % spec.vocab
    a, b = (evaluate(graph, t, params=params) for t in (tokens, other))
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.equal(a[:, 6:], b[:, 6:])


def test_llama_block_against_plain_torch() -> None:
    kinds = {
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8, "rope": {"theta": 500.0}},
        "mlp": {"width": 20},
    }
    spec = ModelSpec.of(vocab=31, hidden=24, pattern="*-", **kinds)
    p = weights(spec)
    tokens = torch.randint(0, 31, (2, 7))
    x = p["embed"][tokens]

    def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], w, spec.norm_eps)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(7, dtype=torch.float64)[:, None] * 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    q, k, v = (rms(x, p["layers.0.norm"]) @ p["layers.0.w_in"].T).split([32, 16, 16], -1)
    q, k, v = rotate(q.unflatten(-1, (4, 8))), rotate(k.unflatten(-1, (2, 8))), v.unflatten(-1, (2, 8))
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    o = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True).transpose(1, 2).flatten(2)
    x = x + o @ p["layers.0.w_out"].T
    gate, up = (rms(x, p["layers.1.norm"]) @ p["layers.1.w_in"].T).chunk(2, -1)
    x = x + (F.silu(gate) * up) @ p["layers.1.w_out"].T
    logits = rms(x, p["final.norm"]) @ p["head"].T
    torch.testing.assert_close(evaluate(build(spec, dtype="f64"), tokens, params=p), logits, rtol=1e-10, atol=1e-10)


def test_loss_is_the_cross_entropy_of_the_logits_plus_the_balance_losses() -> None:
    spec = shrink(load_spec("demo"))
    p = weights(spec)
    tokens, labels = torch.randint(0, spec.vocab, (2, 9)), torch.randint(0, spec.vocab, (2, 9))
    labels[0, 3:] = -100
    logits = evaluate(build(spec, dtype="f64"), tokens, params=p)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss = evaluate(build(spec, task="loss", dtype="f64"), tokens, labels, params=p)
    moes = sum(k.kind == "moe" for k in spec.blocks)
    assert moes and 0 < float(loss - plain) < 0.01 * moes * 4


def test_sizes_of_a_layer_are_numbers() -> None:
    for type_, _ in parameters(build(load_spec("demo"))).values():
        assert all(value(d.size, {}) > 0 for d in type_.dims)
