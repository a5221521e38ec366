"""Every model_type that is known, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...ir.errors import SpecError
from ..problems import shown, suggest
from . import (
    bailing,
    decoders,
    encoders,
    gated_conv,
    gemma3,
    gptoss,
    griffin,
    hybrids,
    latent,
    minimax,
    mixtures,
    olmo,
    parallels,
    qwen35,
    selective,
    shared_blocks,
    variants,
)
from .config import Config
from .plan import Plan

FAMILIES: dict[str, Callable[[Config], Plan]] = {
    family.__name__: family
    for family in (
        decoders.llama, decoders.mistral, decoders.qwen2, decoders.qwen3, decoders.phi3, decoders.granite, decoders.olmo2,
        decoders.gemma, decoders.gemma2, decoders.gpt2, mixtures.mixtral, mixtures.qwen2_moe, mixtures.qwen3_moe,
        hybrids.qwen3_next, hybrids.mamba2, hybrids.nemotron_h, hybrids.granitemoehybrid, latent.deepseek_v3,
        latent.kimi_linear, parallels.falcon_h1, variants.gpt_neox, variants.starcoder2, variants.cohere, variants.cohere2,
        variants.smollm3, variants.gemma3_text, variants.glm4, variants.granitemoe,
        selective.bamba, selective.jamba, selective.mamba, gated_conv.lfm2, griffin.recurrent_gemma,
        shared_blocks.zamba2,
        qwen35.qwen3_5, qwen35.qwen3_5_text, qwen35.qwen3_5_moe, qwen35.qwen3_5_moe_text,
        gptoss.gpt_oss, olmo.olmo, olmo.olmo_hybrid, latent.deepseek_v2, gemma3.gemma3, minimax.minimax, bailing.bailing_hybrid,
        encoders.t5, encoders.bart,
    )
}  # fmt: skip


def read_plan(config: Mapping[str, Any]) -> Plan:
    """What a config comes to. Raises SpecError for a family or an attribute that is not honoured."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise SpecError(f"config.json: model_type: is {shown(family)}; {suggest(family, FAMILIES)}")
    try:
        return FAMILIES[family](Config(config))
    except SpecError as error:
        said = str(error)
        raise SpecError(said if said.startswith("config.json") else f"config.json, read as a spec: {said}") from None
