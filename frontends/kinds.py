"""The layer kinds a model is a sequence of: each block is `x + mixer(norm(x))`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .feed import Mlp, Moe
from .kinds_cross import Grouped, Relative
from .record import (
    MAX_SIZE,
    WAY,
    Act,
    AttentionWay,
    Count,
    Frozen,
    NotNegative,
    Positive,
    RecurrenceWay,
    Size,
    Sublayer,
    at_most,
    bounded,
    default_to,
    divides,
)  # fmt: skip
from .rope import Rope, RopeFar, RopeRamp, RopeScaling, divided

__all__ = [
    "MAX_SIZE", "Act", "Attention", "AttentionWay", "Count", "Frozen", "Gdn", "Kda", "Mamba2", "Mla", "Mlp", "Moe",
    "NotNegative", "Positive", "RecurrenceWay", "Rope", "RopeFar", "RopeRamp", "RopeScaling",
    "Size", "Sublayer", "at_most", "bounded", "default_to", "divides",
]  # fmt: skip


class Attention(Grouped):
    """Softmax attention with grouped key/value heads."""

    kind: Literal["attention"] = "attention"
    qk_norm: bool = Field(default=False, description="RMS norm of every query and key head")
    qk_norm_whole: bool = Field(default=False, description="that norm is of all heads together, not of each")
    rope: Rope | None = Field(default=None, description="rotary positions; none when absent")
    relative: Relative | None = Field(default=None, description="learned bias of scores by distance; none when absent")
    window: Count = Field(default=0, description="keys a query sees, itself included; 0 for all")
    gate: bool = Field(default=False, description="sigmoid gate on every output element, projected beside the query")
    sinks: bool = Field(default=False, description="a learned extra logit per head in the softmax")
    bias: bool = Field(default=False, description="bias on the query, key, value and gate projections")
    out_bias: bool = Field(default=False, description="bias on the output projection")
    softcap: NotNegative = Field(default=0.0, description="scores become c tanh(score / c); 0 for none")
    scale: Positive | None = Field(default=None, description="score multiplier; head_dim**-0.5 unless given")
    clip: NotNegative = Field(default=0.0, description="queries, keys and values are clamped to [-clip, clip]; 0 for none")
    causal: bool = Field(default=True, description="a query sees no later key")
    cp: AttentionWay = Field(default="", description=WAY)

    def rules(self) -> list[str]:
        lines = divides("kv_heads", self.kv_heads, "heads", self.heads)
        lines += bounded("heads", "heads * head_dim * (2 if gate)", self.query_width * (2 if self.gate else 1))
        if self.rope and (self.rotated < 2 or self.rotated % 2):
            lines.append(
                f"rope.fraction: is {self.rope.fraction}, which rotates {self.rotated} of head_dim = {self.head_dim} "
                "columns; must rotate an even number, at least 2"
            )
        lines += divided(self.rope, self.rotated)
        if self.qk_norm_whole and not self.qk_norm:
            lines.append("qk_norm_whole: is true; must be false without qk_norm")
        if self.relative and (self.window or self.sinks or self.softcap or self.cp):
            lines.append("relative: must be absent beside window, sinks, softcap and cp")
        return lines

    @property
    def q_norm_width(self) -> int:
        """Weights of the norm of queries."""
        return self.query_width if self.qk_norm_whole else self.head_dim

    @property
    def k_norm_width(self) -> int:
        """Weights of the norm of keys."""
        return self.kv_width if self.qk_norm_whole else self.head_dim

    @property
    def rotated(self) -> int:
        """Columns of a head that rope rotates."""
        return int(self.head_dim * self.rope.fraction) if self.rope else 0

    @property
    def multiplier(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


class Mla(Sublayer):
    """Latent attention: keys and values of all heads come from one narrow vector; a part of the keys is shared by all."""

    kind: Literal["mla"] = "mla"
    heads: Size = Field(description="heads of query, key and value alike")
    own_dim: Size = Field(description="columns of a query or key head that are its own, without positions")
    shared_dim: Size = Field(description="columns of a key head that all heads share; rope is theirs")
    value_dim: Size = Field(description="columns of a value head")
    kv_rank: Size = Field(description="columns of the vector that keys and values come from")
    q_rank: Count = Field(default=0, description="columns of the vector that queries come from; 0 for the input itself")
    rope: Rope | None = Field(default=None, description="rotary positions; none when absent")
    rank_eps: Positive = Field(default=1e-6, le=1.0, description="epsilon of the norms of these vectors")
    scale: Positive | None = Field(default=None, description="score multiplier; (own_dim + shared_dim)**-0.5 unless given")
    gate: bool = Field(default=False, description="sigmoid gate on every head, projected beside the query")
    cp: AttentionWay = Field(default="", description=WAY)

    def rules(self) -> list[str]:
        lines = bounded("heads", "the keys and values", self.kv_width) + bounded("heads", "the queries", self.query_width)
        if self.rope and (self.rope.fraction != 1 or self.shared_dim % 2):
            lines.append(f"shared_dim: is {self.shared_dim}; rope must rotate all of it (fraction = 1), an even number")
        return lines + divided(self.rope, self.shared_dim) + bounded("q_rank", "the input projection", self.in_width)

    @property
    def head_dim(self) -> int:
        """Columns of a query or key head."""
        return self.own_dim + self.shared_dim

    @property
    def query_width(self) -> int:
        """Columns of all queries."""
        return self.heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Columns of all values."""
        return self.heads * self.value_dim

    @property
    def kv_width(self) -> int:
        """Columns of the keys' own parts and the values."""
        return self.heads * (self.own_dim + self.value_dim)

    @property
    def in_width(self) -> int:
        """Columns of the input projection: query or what it comes from | what keys and values come from | shared key | gate."""
        return (self.q_rank or self.query_width) + self.kv_rank + self.shared_dim + self.heads * self.gate


class Gdn(Sublayer):
    """Gated delta net: scalar decay, delta rule, grouped value heads, norm then gate."""

    kind: Literal["gdn"] = "gdn"
    key_heads: Size = Field(description="query and key heads")
    value_heads: Size = Field(description="value heads, a multiple of the key heads")
    key_dim: Size = Field(description="columns of a query or key head")
    value_dim: Size = Field(description="columns of a value head")
    conv: Size = Field(default=4, le=64, description="taps of the short convolution over q, k and v")
    gate_act: Literal["silu", "sigmoid"] = Field(default="silu", description="activation of the output gate")
    beta_scale: Positive = Field(default=1.0, le=2.0, description="what the delta rule's step in (0, 1) is multiplied by")
    out_eps: Positive | None = Field(default=None, le=1.0, description="epsilon of the output norm; the model's unless given")
    cp: RecurrenceWay = Field(default="", description=WAY)

    def rules(self) -> list[str]:
        lines = divides("key_heads", self.key_heads, "value_heads", self.value_heads)
        return lines + bounded("value_heads", "the input projection", self.in_width)

    @property
    def key_width(self) -> int:
        """Columns of the query, and of the key."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Columns of the value, and of the output gate."""
        return self.value_heads * self.value_dim

    @property
    def conv_width(self) -> int:
        """Channels of the short convolution: q | k | v."""
        return 2 * self.key_width + self.value_width

    @property
    def in_width(self) -> int:
        """Columns of the input projection: q | k | v | gate | beta | alpha."""
        return self.conv_width + self.value_width + 2 * self.value_heads


class Kda(Sublayer):
    """Kimi delta attention: decay per key channel and sigmoid output gate, both of rank head_dim or of full rank."""

    kind: Literal["kda"] = "kda"
    heads: Size = Field(description="heads of query, key and value alike")
    head_dim: Size = Field(description="columns of a head, and rank of the decay and output gates")
    full_rank: bool = Field(default=False, description="the decay and output gates are projected at once")
    decay_floor: float = Field(
        default=0.0, le=0, description="decays stay above this, floor * sigmoid(exp(A_log) * step); 0 for no floor"
    )
    conv: Size = Field(default=4, le=64, description="taps of the short convolutions, one each for q, k and v")
    cp: RecurrenceWay = Field(default="", description=WAY)

    def rules(self) -> list[str]:
        return bounded("heads", "the input projection", self.in_width)

    @property
    def width(self) -> int:
        """Columns of the query, the key, the value and both gates."""
        return self.heads * self.head_dim

    @property
    def rank(self) -> int:
        """Columns that each gate comes from."""
        return self.width if self.full_rank else self.head_dim

    @property
    def in_width(self) -> int:
        """Columns of the input projection: q | k | v | decay | gate | beta."""
        return 3 * self.width + 2 * self.rank + self.heads


class Mamba2(Sublayer):
    """Mamba-2: state space duality with grouped B and C, gate then grouped norm."""

    kind: Literal["mamba2"] = "mamba2"
    heads: Size = Field(description="heads")
    head_dim: Size = Field(description="columns of a head")
    state: Size = Field(description="state columns per head channel")
    groups: Size = Field(default=1, description="groups of heads that share B and C")
    conv: Size = Field(default=4, le=64, description="taps of the short convolution over x, B and C")
    norm_groups: Size = Field(default=0, description="groups of the gated RMS norm; as many as groups unless given")
    conv_bias: bool = Field(default=True, description="bias on the short convolution")
    dt_min: Positive = Field(default=0.001, description="smallest initial time step")
    dt_max: Positive = Field(default=0.1, description="largest initial time step")
    dt_floor: Positive = Field(default=0.0001, description="initial time steps are raised to this")
    dt_limit: tuple[NotNegative, NotNegative] | None = Field(
        default=None, strict=False, description="[low, high] of time steps as the model runs; no limit when absent"
    )
    in_scales: tuple[float, ...] = Field(
        default=(), strict=False, description="what z, x, B, C and dt are multiplied by as they are projected; five, or none"
    )
    out_norm: bool = Field(default=True, description="a norm behind the gate")
    norm_first: bool = Field(default=False, description="that norm stands before the gate")
    a_min: Positive = Field(default=1.0, description="smallest initial decay rate")
    a_max: Positive = Field(default=16.0, description="largest initial decay rate")
    cp: RecurrenceWay = Field(default="", description=WAY)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields: object) -> object:
        return default_to(cls, fields, "norm_groups", "groups")

    def rules(self) -> list[str]:
        lines = divides("groups", self.groups, "heads", self.heads)
        if self.norm_groups != self.groups:
            lines += divides("norm_groups", self.norm_groups, "heads * head_dim", self.inner)
        lines += at_most("dt_min", self.dt_min, "dt_max", self.dt_max)
        lines += at_most("a_min", self.a_min, "a_max", self.a_max)
        if len(self.in_scales) not in (0, 5):
            lines.append(f"in_scales: has {len(self.in_scales)}; must have five (z, x, B, C, dt) or none")
        if self.dt_limit:
            lines += at_most("dt_limit.0", self.dt_limit[0], "dt_limit.1", self.dt_limit[1])
        return lines + bounded("heads", "the input projection", self.in_width)

    @property
    def inner(self) -> int:
        """Columns of x, and of its gate z."""
        return self.heads * self.head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the short convolution: x | B | C."""
        return self.inner + 2 * self.groups * self.state

    @property
    def in_width(self) -> int:
        """Columns of the input projection: z | x | B | C | dt."""
        return self.inner + self.conv_width + self.heads
