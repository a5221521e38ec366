"""The peers: small transformers models and their torch chunk functions, eager and under torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 4096
HIDDEN = 512
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Peer(nn.Module):
    """A transformers causal model with our call shape: tokens give logits, tokens and labels give the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or the mean loss of the next token."""
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return logits if labels is None else next_token_loss(logits, labels)


class MaskFree(Peer):
    """The same model by its own layers, without the causal mask that tracing writes out (SDPA then skips its half)."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or the mean loss of the next token."""
        body: Any = self.model.model
        x = body.embed_tokens(tokens)
        places = torch.arange(tokens.shape[1]).unsqueeze(0)
        rotary = body.rotary_emb(x, places)
        for layer in body.layers:
            x = layer(x, position_embeddings=rotary, attention_mask=None, position_ids=places)
        logits = self.model.lm_head(body.norm(x))
        return logits if labels is None else next_token_loss(logits, labels)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in float32 of each token's prediction of the next one."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def build(name: str, dtype: str = "f32", layers: int = 4) -> Peer:
    """A peer with random weights, by the name of its mini."""
    torch.manual_seed(0)
    return Peer(MINIS[name](layers).to(DTYPES[dtype]))


def mask_free(peer: Peer) -> Peer | None:
    """The mask-free form over the same weights, for the models that have a mask."""
    return MaskFree(peer.model) if hasattr(peer.model, "model") else None


def parameter_count(module: nn.Module) -> int:
    """Stored numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def decode(peer: Peer, prompt: Tensor, count: int) -> Tensor:
    """Greedy continuation with transformers' cache: the loop inside `generate` without its bookkeeping."""
    key = "past_key_values" if hasattr(peer.model, "model") else "cache_params"
    tokens, cache, said = prompt, None, list[Tensor]()
    for _ in range(count):
        out = peer.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **({} if cache is None else {key: cache}))
        cache, tokens = getattr(out, key), out.logits[:, -1:].argmax(-1)
        said.append(tokens)
    return torch.cat(said, 1)


def _q3n(layers: int, **changes: Any) -> nn.Module:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 1408, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "num_experts": 0,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen3NextForCausalLM(Qwen3NextConfig(**(sizes | changes)))


def _q3n_moe(layers: int) -> nn.Module:
    return _q3n(layers, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=352, shared_expert_intermediate_size=352)


def _llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 1408, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes))


def _mamba2(layers: int) -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_heads": 16, "head_dim": 64,
        "state_size": 128, "n_groups": 1, "expand": 2, "conv_kernel": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    return Mamba2ForCausalLM(Mamba2Config(**sizes))


MINIS: dict[str, Callable[[int], nn.Module]] = {"q3n": _q3n, "q3n-moe": _q3n_moe, "llama": _llama, "mamba2": _mamba2}


def _function(family: str, name: str) -> Callable[..., Any]:
    """A function of a transformers modeling file."""
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


PACKED = (0, 100, 357, 1024)  # borders of the segments of a packed row


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None = None) -> Tensor:
    """Qwen3-Next's chunked rule; it scales by the root of the key width itself."""
    return _function("qwen3_next", "torch_chunk_gated_delta_rule")(q, k, v, g=decay, beta=beta, initial_state=state)[0]


def packed_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, _cu: Tensor) -> Tensor:
    """The same, one segment after another: a form that knows segments is not in transformers' torch code."""
    parts = [[x[:, a:b] for x in (q, k, v, decay, beta)] for a, b in pairwise(PACKED)]
    return torch.cat([gated_delta_rule(*part) for part in parts], 1)


def kimi_delta_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """Kimi-Linear's chunked rule; it scales by the root of the key width itself."""
    return _function("kimi_linear", "chunk_kimi_delta_attention")(q, k, v, decay, beta)[0]


def selective_scan(x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor) -> Tensor:
    """Mamba's scan without its skip connection: token by token in eager, an associative scan where it is compiled."""
    x, step, k, q = (y.transpose(1, 2) for y in (x, step, k, q))
    return _function("mamba", "mamba_selective_scan")(x, step, rate, k, q, use_associative_scan=True).transpose(1, 2)


def rg_lru(x: Tensor, decay: Tensor, places: Tensor) -> Tensor:
    """RecurrentGemma's unit behind its gates, token by token as it does."""
    a, begins = decay.exp(), (places == 0)[:, :, None]
    u = x * torch.where(begins, 1.0, (1 - a * a).sqrt())
    h, rows = torch.zeros_like(x[:, 0]), list[Tensor]()
    for kept, entered in zip((a * ~begins).unbind(1), u.unbind(1), strict=True):
        h = kept * h + entered
        rows.append(h)
    return torch.stack(rows, 1)


def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba-2's chunked scan, without its skip connection."""
    out = _function("mamba2", "mamba2_chunk_scan")(x, dt, a, b, c, 256)
    return out[0] if isinstance(out, tuple) else out


def conv_silu(x: Tensor, w: Tensor) -> Tensor:
    """The short convolution as the models call it, between two transposed views."""
    return _function("qwen3_next", "causal_conv1d_fn")(x.transpose(1, 2), w, None, activation="silu").transpose(1, 2)


def gated_norm(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    """Qwen3-Next's RMSNormGated."""
    n = x.float()
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-6)
    return ((w * n.to(x.dtype)) * F.silu(gate.float())).to(x.dtype)


def norm(x: Tensor, w: Tensor) -> Tensor:
    """Qwen3-Next's zero-centred RMSNorm."""
    n = x.float()
    return (n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


def add_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The residual add and the norm after it."""
    total = x + residual
    return norm(total, w), total


def qk_norm_rope(q: Tensor, k: Tensor, w_q: Tensor, w_k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen3-Next's query and key norms and its rotation of the first quarter of each head."""
    angle = places[..., None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    cos, sin = (each.repeat(1, 1, 2) for each in (angle.cos(), angle.sin()))
    return _function("qwen3_next", "apply_rotary_pos_emb")(norm(q, w_q), norm(k, w_k), cos, sin, unsqueeze_dim=2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The pointwise middle of a gated MLP."""
    return F.silu(gate) * up
