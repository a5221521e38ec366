"""Families with an encoder and a decoder whose cross attention reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..encoder import Encoder
from ..kinds import Attention, Mlp
from ..kinds_cross import Cross, Relative
from ..problems import shown
from ..sequence import Kind
from . import tables_third as tables
from .config import Config
from .plan import Placed, Plan, make_plan

# How configs say text is to be generated, which is asked for where it is, and how training saves memory.
WISHES = (
    "diversity_penalty", "do_sample", "early_stopping", "gradient_checkpointing", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_past", "repetition_penalty",
    "temperature", "top_k", "top_p",
)  # fmt: skip
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def t5(c: Config) -> Plan:
    """Pre-norm without biases; scores neither scaled nor given positions but by a table of distances; relu or gated."""
    c.idle(*WISHES)
    c.must("is_decoder", False)
    c.must("is_encoder_decoder", True)
    c.training("dropout_rate")
    hidden, heads = c.size("d_model", 512), c.size("num_heads", 8)
    buckets, reach = c.size("relative_attention_num_buckets", 32), c.size("relative_attention_max_distance", 128)
    encoder, decoder = _t5_stacks(c, heads, Relative(buckets=buckets, reach=reach))
    tied = c.flag("tie_word_embeddings", True)
    scaled = {"logit_scale": hidden**-0.5} if c.flag("scale_decoder_outputs", tied) else {}
    outside = tables.T5_OUTSIDE.replace("{buckets}", str(buckets)).replace("{heads}", str(heads))
    plan = make_plan(
        c, decoder, outside, prefix="", derived=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias.*",),
        hidden=hidden, norm_eps=c.number("layer_norm_epsilon", 1e-6), max_length=c.size("n_positions", 512), tied=tied,
        encoder=_encoder(c, encoder, pad=0, start=None), **scaled,
    )  # fmt: skip
    return replace(plan, encoder=tuple(encoder), copies=COPIES)


def _t5_stacks(c: Config, heads: int, relative: Relative) -> tuple[list[Placed], list[Placed]]:
    """The encoder's blocks and the decoder's."""
    head_dim, mlp, count = c.size("d_kv", 64), _t5_mlp(c), c.size("num_layers", 6)
    attention = Attention(heads=heads, head_dim=head_dim, relative=relative, scale=1.0)
    cross, seen = Cross(heads=heads, head_dim=head_dim, scale=1.0), attention.model_copy(update={"causal": False})
    ffn = tables.T5_GATED_MLP if mlp.glu else tables.T5_MLP
    first, second = (ffn.replace("{at}", f"layer.{i}.") for i in (1, 2))
    encoder = _stack("encoder.block.{}.", count, [(seen, tables.T5_ATTENTION), (mlp, first)])
    told: list[tuple[Kind, str]] = [(attention, tables.T5_ATTENTION), (cross, tables.T5_CROSS), (mlp, second)]
    return encoder, _stack("decoder.block.{}.", c.size("num_decoder_layers", count), told)


def _t5_mlp(c: Config) -> Mlp:
    """`relu`, or `gated-gelu`, which has always meant the approximate one; what follows from it is checked where it is said."""
    said = str(c.get("feed_forward_proj", "relu"))
    gated, name = said.startswith("gated-"), said.removeprefix("gated-")
    c.must("is_gated_act", gated)
    c.must("dense_act_fn", "gelu_new" if said == "gated-gelu" else name)
    act: Any = Config({"feed_forward_proj": "gelu_new" if said == "gated-gelu" else name}).act("feed_forward_proj")
    return Mlp(width=c.size("d_ff", 2048), act=act, glu=gated)


def _stack(at: str, count: int, told: Sequence[tuple[Kind, str]]) -> list[Placed]:
    return [Placed(kind, at.format(i), table) for i in range(count) for kind, table in told]


def _encoder(c: Config, blocks: Sequence[Placed], pad: int, start: int | None) -> Encoder:
    """The blocks, and the tokens that labels are turned into a decoder's tokens with."""
    ids = {"pad": c.get("pad_token_id", pad)}
    ids["start"] = c.get("decoder_start_token_id", ids["pad"] if start is None else start)
    for name, token in ids.items():
        if type(token) is not int or not 0 <= token < c.size("vocab_size"):
            c.problems.append(f"{name} token: is {shown(token)}; must be one of the vocabulary")
            ids[name] = 0
    return Encoder(blocks=tuple(b.kind for b in blocks), **ids)


def bart(c: Config) -> Plan:
    """Norms behind every sum: the block after it reads them, and the last one stands in front of the head."""
    c.idle(*WISHES, "_num_labels", "classif_dropout", "extra_pos_embeddings", "force_bos_token_to_be_generated")
    c.idle("num_hidden_layers", "num_labels", "save_step")
    for name, only in (("is_decoder", False), ("is_encoder_decoder", True), ("normalize_embedding", True)):
        c.must(name, only)
    for name in ("add_bias_logits", "add_final_layer_norm", "normalize_before", "static_position_embeddings"):
        c.must(name, False)
    c.training("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
    hidden = c.size("d_model", 1024)
    encoder, before = _bart_stack(c, "encoder", hidden)
    decoder, last = _bart_stack(c, "decoder", hidden)
    scale = hidden**0.5 if c.flag("scale_embedding") else 1.0
    plan = make_plan(
        c, decoder, tables.BART_OUTSIDE.replace("{encoder}", before).replace("{decoder}", last), hidden=hidden, norm="layer",
        norm_eps=1e-5, learned_positions=True, position_start=2, max_length=c.size("max_position_embeddings", 1024),
        embed_scale=scale, init_std=c.number("init_std", 0.02), tied=c.flag("tie_word_embeddings", True), head_bias=True,
        encoder=_encoder(c, encoder, pad=1, start=2),
    )  # fmt: skip
    return replace(plan, encoder=tuple(encoder), copies=tuple(f"model.{n}" for n in COPIES), zeros=("final_logits_bias",))


def _bart_stack(c: Config, side: str, hidden: int) -> tuple[list[Placed], str]:
    """One side's blocks, and where the norm behind its last one is."""
    heads = c.size(f"{side}_attention_heads", 16)
    if hidden % heads:
        c.problems.append(f"{side}_attention_heads: is {heads}; must divide d_model = {hidden}")
    own: dict[str, Any] = {"heads": heads, "head_dim": max(hidden // heads, 1), "bias": True, "out_bias": True}
    own["norm_place"] = "stream"
    act: Any = c.act("activation_function", "gelu")
    mlp = Mlp(width=c.size(f"{side}_ffn_dim", 4096), act=act, glu=False, bias=True, norm_place="stream")
    parts: list[tuple[Kind, str, str, str]] = [
        (Attention(**own, causal=side == "decoder"), tables.BART_ATTENTION, "self_attn.", "self_attn_layer_norm."),
        *([(Cross(**own), tables.BART_CROSS, "encoder_attn.", "encoder_attn_layer_norm.")] if side == "decoder" else []),
        (mlp, tables.BART_MLP, "", "final_layer_norm."),
    ]
    norm, placed = f"model.{side}.layernorm_embedding.", list[Placed]()
    for i in range(c.size(f"{side}_layers", 12)):
        for kind, table, at, behind in parts:
            home = f"model.{side}.layers.{i}."
            placed.append(Placed(kind, "", table.replace("{norm}", norm).replace("{at}", home + at)))
            norm = home + behind
    return placed, norm
