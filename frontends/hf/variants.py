"""Families of attention and dense layers that differ in norms, in where positions are, or in what stands side by side."""

from __future__ import annotations

from typing import Any

from ..kinds import Attention, Mlp, Rope
from ..parallel import Parallel
from ..sequence import Kind
from . import pieces, tables
from .config import Config
from .decoders import cap, dense, each, gemma_fields, granite_scales, rms, stack
from .mixtures import mixed
from .pieces import FULL, SLIDING, read_attention, read_mlp, with_bias
from .plan import Placed, Plan, make_plan
from .ropes import read_rope


def gpt_neox(c: Config) -> Plan:
    """Attention and feed-forward side by side, each with its own norm, or one behind the other."""
    c.training("attention_dropout", "hidden_dropout")
    theta, share = c.number("rotary_emb_base", 10000.0), c.number("rotary_pct", 0.25)
    bias = c.flag("attention_bias", True)
    attention = read_attention(c, theta=theta, fraction=share, bias=bias, out_bias=bias)
    act: Any = c.act("hidden_act", "gelu")
    mlp = Mlp(width=c.size("intermediate_size"), act=act, glu=False, bias=True)
    at, count = "gpt_neox.layers.{}.", pieces.layers(c)
    pairs: list[tuple[Kind, str]] = [(attention, tables.NEOX_ATTENTION), (mlp, tables.NEOX_MLP)]
    blocks = stack(pairs * count, at=at)
    if c.flag("use_parallel_residual", True):
        kind = Parallel(parts=(attention, mlp), own_norms=True)
        blocks = [Placed(kind, at.format(i), "", (tables.NEOX_ATTENTION, tables.NEOX_MLP)) for i in range(count)]
    derived = (r".*\.attention\.(masked_)?bias", r".*rotary_emb\..*")
    fields = layer_norms(c, "layer_norm_eps")
    return make_plan(c, blocks, tables.NEOX_OUTSIDE, prefix="gpt_neox.", derived=derived, **fields)


def layer_norms(c: Config, eps: str, **more: Any) -> dict[str, Any]:
    """Width, and layer norms with their epsilon."""
    return {"hidden": c.size("hidden_size"), "norm": "layer", "norm_eps": c.number(eps, 1e-5), **more}


def starcoder2(c: Config) -> Plan:
    c.training("residual_dropout", "embedding_dropout")
    bias, count = c.flag("use_bias", True), pieces.layers(c)
    attention = read_attention(c, bias=bias, out_bias=bias, window=pieces.window(c))
    act: Any = c.act("hidden_act", "gelu_pytorch_tanh")
    mlp = Mlp(width=c.size("intermediate_size"), act=act, glu=False, bias=bias)
    pairs: list[tuple[Kind, str]] = [(attention, tables.STARCODER_ATTENTION), (mlp, tables.STARCODER_MLP)]
    fields = layer_norms(c, "norm_epsilon", tied=c.flag("tie_word_embeddings", True))
    return make_plan(c, stack(pairs * count), tables.STARCODER_OUTSIDE, **fields)


def cohere(c: Config) -> Plan:
    c.must("use_qk_norm", False)
    return _cohere(c, [interleaved(read_attention(c, theta=5e5, **with_bias(c)))] * pieces.layers(c))


def cohere2(c: Config) -> Plan:
    """Layers with a window have positions, layers without have none."""
    every, count = c.size("sliding_window_pattern", 4), pieces.layers(c)
    default = [SLIDING if (i + 1) % every else FULL for i in range(count)]
    spans = pieces.windows(c, count, default, pieces.window(c, 4096))
    near = interleaved(read_attention(c, **with_bias(c)))
    far = near.model_copy(update={"rope": None})
    return _cohere(c, [near.model_copy(update={"window": span}) if span else far for span in spans])


def interleaved(kind: Attention) -> Attention:
    """The same, neighbours turned together."""
    assert kind.rope is not None
    return kind.model_copy(update={"rope": kind.rope.model_copy(update={"interleaved": True})})


def _cohere(c: Config, attention: list[Attention]) -> Plan:
    """Attention and feed-forward side by side behind one norm that has no bias."""
    mlp, parts = read_mlp(c), (tables.ATTENTION, tables.MLP)
    norm = "norm = input_layernorm.weight[hidden]\n"
    blocks = [Placed(Parallel(parts=(a, mlp)), f"model.layers.{i}.", norm, parts) for i, a in enumerate(attention)]
    fields = layer_norms(c, "layer_norm_eps", norm_bias=False, logit_scale=c.number("logit_scale", 0.0625))
    return make_plan(c, blocks, tables.OUTSIDE, tied=c.flag("tie_word_embeddings", True), **fields)


def smollm3(c: Config) -> Plan:
    """Llama with layers that have no positions."""
    count, every = pieces.layers(c), c.size("no_rope_layer_interval", 4)
    has_rope = c.listed("no_rope_layers", [int((i + 1) % every != 0) for i in range(count)], count)
    width = pieces.window(c) if c.flag("use_sliding_window") else 0
    c.idle("sliding_window")
    default = [SLIDING if width and not has_rope[i] else FULL for i in range(count)]
    spans = pieces.windows(c, count, default, width)
    plain = read_attention(c, theta=2e6, **with_bias(c))
    ropes = [plain.rope if has_rope[i] else None for i in range(count)]
    attention = [plain.model_copy(update={"rope": r, "window": w}) for r, w in zip(ropes, spans, strict=True)]
    fields: dict[str, Any] = {"tied": c.flag("tie_word_embeddings", True)}
    return dense(c, attention, read_mlp(c, bias=c.flag("mlp_bias")), **fields)


def gemma3_text(c: Config) -> Plan:
    """Gemma 2 with norms of queries and keys in place of softcaps, and other positions where there is a window."""
    c.must("use_bidirectional_attention", None, False)
    count, every = pieces.layers(c), c.size("sliding_window_pattern", 6)
    c.idle("_sliding_window_pattern", "hidden_act")
    scale = c.above("query_pre_attn_scalar", 256) ** -0.5
    plain = read_attention(
        c, rope=False, qk_norm=True, scale=scale, softcap=cap(c, "attn_logit_softcapping", 0.0), **with_bias(c)
    )
    spans = pieces.windows(c, count, [SLIDING if (i + 1) % every else FULL for i in range(count)], pieces.window(c, 4096))
    near, far = _gemma_ropes(c, plain.head_dim)
    attention = [plain.model_copy(update={"window": w, "rope": near if w else far}) for w in spans]
    mlp = Mlp(width=c.size("intermediate_size"), act=c.act("hidden_activation", "gelu_pytorch_tanh"))  # type: ignore[arg-type] # a known name
    fields = {**gemma_fields(c), "norm_place": "both", "logit_softcap": cap(c, "final_logit_softcapping", 0.0)}
    return dense(c, attention, mlp, mix=tables.GEMMA_ATTENTION, ffn=tables.GEMMA_MLP, **fields)


def _gemma_ropes(c: Config, width: int) -> tuple[Rope, Rope]:
    """Positions of layers with a window, and of those without."""
    both = {kind: inner if isinstance(inner, dict) else {} for kind, inner in c.table("rope_parameters").items()}
    far = {"rope_theta": c.number("rope_theta", 1e6), **c.table("rope_scaling"), **both.get(FULL, {})}
    near = {"rope_theta": c.number("rope_local_base_freq", 1e4), **both.get(SLIDING, {})}
    length = c.size("max_position_embeddings", 131072)
    inner = [Config({"rope_parameters": table, "max_position_embeddings": length}) for table in (near, far)]
    ropes = [read_rope(one, width=width) for one in inner]
    c.problems += [line for one in inner for line in one.problems]
    c.notes += [line for one in inner for line in one.notes]
    return ropes[0], ropes[1]


def glm4(c: Config) -> Plan:
    attention = interleaved(read_attention(c, fraction=0.5, bias=c.flag("attention_bias", True)))
    fields = {"norm_place": "both", **rms(c, 1.5625e-07)}
    return dense(c, [attention] * pieces.layers(c), read_mlp(c), mix=tables.GLM_ATTENTION, ffn=tables.GLM_MLP, **fields)


def granitemoe(c: Config) -> Plan:
    attention = read_attention(c, scale=c.number("attention_multiplier", 1.0), **with_bias(c))
    moe = pieces.read_moe(c, "num_local_experts", "intermediate_size")
    count = pieces.layers(c)
    return mixed(c, each(attention, [0] * count), [(moe, tables.GRANITE_MOE)] * count, **granite_scales(c))
