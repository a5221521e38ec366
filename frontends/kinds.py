"""The layer kinds a model is a sequence of: each block is `x + mixer(norm(x))`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .problems import explain, refuse

MAX_SIZE = 2**31 - 1

Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Count = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
AttentionWay = Literal["", "heads", "kv", "ring", "gather"]
RecurrenceWay = Literal["", "heads", "states", "scan", "chain", "gather"]
_WAY = "way across ranks that tokens are split over, as `place` names them; what the pass is told when empty"
Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


class Frozen(BaseModel):
    """A frozen record that refuses unknown fields and complains with a SpecError."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # a checker reads the fields as the signature

        def __init__(self, **fields: Any) -> None:
            try:
                self.__pydantic_validator__.validate_python(fields, self_instance=self)
            except ValidationError as error:
                problems = explain(error, type(self))
            else:
                return
            refuse(problems, type(self).__name__)

        # Validation of a nested table then stays inside pydantic, which adds the outer path.
        __init__.__pydantic_base_init__ = True

    def rules(self) -> list[str]:
        """What is wrong across fields, one line `field: is ...; must ...` each."""
        return []

    @model_validator(mode="after")
    def _obey(self) -> Frozen:
        if lines := self.rules():
            raise ValueError("\n".join(lines))
        return self


def divides(part: str, n: int, whole: str, total: int) -> list[str]:
    """The rule that one size divides another."""
    return [] if total % n == 0 else [f"{part}: is {n}; must divide {whole} = {total}"]


def bounded(field: str, what: str, width: int) -> list[str]:
    """The rule that a derived width is a size a tensor can have."""
    return [] if width <= MAX_SIZE else [f"{field}: makes {what} = {width}; must stay at or below {MAX_SIZE}"]


def at_most(field: str, n: float, limit: str, value: float) -> list[str]:
    """The rule that one field does not exceed another."""
    return [] if n <= value else [f"{field}: is {n}; must be at most {limit} = {value}"]


def default_to(kind: type[BaseModel], fields: object, name: str, source: str) -> object:
    """Fill an absent field from another, before the fields are checked."""
    if not isinstance(fields, Mapping) or name in fields:
        return fields  # pyright: ignore[reportUnknownVariableType]
    given: dict[str, Any] = dict(fields)  # pyright: ignore[reportUnknownArgumentType]
    value = given.get(source, kind.model_fields[source].default)
    # A source that is itself wrong is reported once, under its own name.
    return {**given, name: value if type(value) is int and 1 <= value <= MAX_SIZE else 1}


class RopeScaling(Frozen):
    """Llama 3 frequency scaling for contexts longer than the original."""

    factor: Positive = Field(description="how much longer the context becomes")
    low: Positive = Field(default=1.0, description="wavelengths above original / low are stretched in full")
    high: Positive = Field(default=4.0, description="wavelengths below original / high are kept")
    original: Size = Field(description="context length before scaling")

    def rules(self) -> list[str]:
        return [] if self.low < self.high else [f"low: is {self.low}; must be less than high = {self.high}"]


class Rope(Frozen):
    """Rotary position embedding."""

    theta: Positive = Field(default=10000.0, description="base of the frequencies")
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of each head's columns that is rotated")
    interleaved: bool = Field(default=False, description="pairs are neighbours (0,1) instead of halves (0,d/2)")
    scaling: RopeScaling | None = Field(default=None, description="Llama 3 frequency scaling")
    rounded: bool = Field(default=False, description="frequencies are float32 numbers, as in the tables of published models")


class Attention(Frozen):
    """Softmax attention with grouped key/value heads."""

    kind: Literal["attention"] = "attention"
    heads: Size = Field(description="query heads")
    kv_heads: Size = Field(default=0, description="key/value heads; as many as heads unless given")
    head_dim: Size = Field(description="columns of a head")
    qk_norm: bool = Field(default=False, description="RMS norm of every query and key head")
    qk_norm_whole: bool = Field(default=False, description="that norm is of all heads together, not of each")
    rope: Rope | None = Field(default=None, description="rotary positions; none when absent")
    window: Count = Field(default=0, description="keys a query sees, itself included; 0 for all")
    gate: bool = Field(default=False, description="sigmoid gate on every output element, projected beside the query")
    sinks: bool = Field(default=False, description="a learned extra logit per head in the softmax")
    bias: bool = Field(default=False, description="bias on the query, key, value and gate projections")
    out_bias: bool = Field(default=False, description="bias on the output projection")
    softcap: NotNegative = Field(default=0.0, description="scores become c tanh(score / c); 0 for none")
    scale: Positive | None = Field(default=None, description="score multiplier; head_dim**-0.5 unless given")
    causal: bool = Field(default=True, description="a query sees no later key")
    cp: AttentionWay = Field(default="", description=_WAY)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields: object) -> object:
        return default_to(cls, fields, "kv_heads", "heads")

    def rules(self) -> list[str]:
        lines = divides("kv_heads", self.kv_heads, "heads", self.heads)
        lines += bounded("heads", "heads * head_dim * (2 if gate)", self.query_width * (2 if self.gate else 1))
        if self.rope and (self.rotated < 2 or self.rotated % 2):
            lines.append(
                f"rope.fraction: is {self.rope.fraction}, which rotates {self.rotated} of head_dim = {self.head_dim} "
                "columns; must rotate an even number, at least 2"
            )
        if self.qk_norm_whole and not self.qk_norm:
            lines.append("qk_norm_whole: is true; must be false without qk_norm")
        return lines

    @property
    def query_width(self) -> int:
        """Columns of the query projection, the gate not counted."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

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


class Mla(Frozen):
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
    cp: AttentionWay = Field(default="", description=_WAY)

    def rules(self) -> list[str]:
        lines = bounded("heads", "the keys and values", self.kv_width) + bounded("heads", "the queries", self.query_width)
        if self.rope and (self.rope.fraction != 1 or self.shared_dim % 2):
            lines.append(f"shared_dim: is {self.shared_dim}; rope must rotate all of it (fraction = 1), an even number")
        return lines + bounded("q_rank", "the input projection", self.in_width)

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
        """Columns of the input projection: query or what it comes from | what keys and values come from | shared key."""
        return (self.q_rank or self.query_width) + self.kv_rank + self.shared_dim


class Gdn(Frozen):
    """Gated delta net: scalar decay, delta rule, grouped value heads, norm then gate."""

    kind: Literal["gdn"] = "gdn"
    key_heads: Size = Field(description="query and key heads")
    value_heads: Size = Field(description="value heads, a multiple of the key heads")
    key_dim: Size = Field(description="columns of a query or key head")
    value_dim: Size = Field(description="columns of a value head")
    conv: Size = Field(default=4, le=64, description="taps of the short convolution over q, k and v")
    gate_act: Literal["silu", "sigmoid"] = Field(default="silu", description="activation of the output gate")
    cp: RecurrenceWay = Field(default="", description=_WAY)

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


class Kda(Frozen):
    """Kimi delta attention: decay per key channel and sigmoid output gate, both of rank head_dim."""

    kind: Literal["kda"] = "kda"
    heads: Size = Field(description="heads of query, key and value alike")
    head_dim: Size = Field(description="columns of a head, and rank of the decay and output gates")
    conv: Size = Field(default=4, le=64, description="taps of the short convolutions, one each for q, k and v")
    cp: RecurrenceWay = Field(default="", description=_WAY)

    def rules(self) -> list[str]:
        return bounded("heads", "3 * heads * head_dim", 3 * self.width)

    @property
    def width(self) -> int:
        """Columns of the query, the key, the value and both gates."""
        return self.heads * self.head_dim


class Mamba2(Frozen):
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
    cp: RecurrenceWay = Field(default="", description=_WAY)

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


class Mlp(Frozen):
    """Dense feed-forward layer, gated or plain."""

    kind: Literal["mlp"] = "mlp"
    width: Size = Field(description="hidden columns")
    act: Act = Field(default="silu", description="activation")
    glu: bool = Field(default=True, description="act(gate) * up instead of act(up)")
    bias: bool = Field(default=False, description="bias on every projection")
    gate_scale: float = Field(default=1.0, description="what the gate is multiplied by before its activation")

    def rules(self) -> list[str]:
        if self.gate_scale != 1 and not self.glu:
            return [f"gate_scale: is {self.gate_scale}; must be 1 without a gate (glu = false)"]
        return bounded("width", "2 * width", 2 * self.width) if self.glu else []


class Moe(Frozen):
    """Mixture of experts: a router sends each token to its top_k experts."""

    kind: Literal["moe"] = "moe"
    experts: Size = Field(description="routed experts")
    top_k: Size = Field(description="experts per token")
    width: Size = Field(description="hidden columns of an expert")
    act: Act = Field(default="silu", description="activation")
    glu: bool = Field(default=True, description="act(gate) * up instead of act(up)")
    score: Literal["softmax", "sigmoid"] = Field(default="softmax", description="router scores from router logits")
    renormalize: bool = Field(default=True, description="the chosen scores are divided by their sum")
    route_bias: bool = Field(default=False, description="a correction bias joins the choice of experts, not their weights")
    route_scale: Positive = Field(default=1.0, description="the chosen weights are multiplied by this")
    groups: Size = Field(default=1, description="groups of experts; a group scores by its best two")
    group_limit: Size = Field(default=0, description="groups a token may choose from; all of them unless given")
    shared_width: Count = Field(default=0, description="hidden columns of the always-on shared expert; 0 for none")
    shared_gate: bool = Field(default=False, description="sigmoid gate per token on the shared expert")
    aux_loss: NotNegative = Field(default=0.0, description="coefficient of the load-balancing loss")
    z_loss: NotNegative = Field(default=0.0, description="coefficient of the router z-loss")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields: object) -> object:
        return default_to(cls, fields, "group_limit", "groups")

    def rules(self) -> list[str]:
        lines = at_most("top_k", self.top_k, "experts", self.experts)
        lines += divides("groups", self.groups, "experts", self.experts)
        lines += at_most("group_limit", self.group_limit, "groups", self.groups)
        if self.groups > 1 and self.experts % self.groups == 0:
            lines += self._group_rules(self.experts // self.groups)
        if self.shared_gate and not self.shared_width:
            lines.append("shared_gate: is true; must be false without a shared expert (shared_width = 0)")
        return lines + bounded("width", "2 * width", 2 * self.width)

    def _group_rules(self, size: int) -> list[str]:
        lines = [] if size > 1 else [f"groups: is {self.groups}; must leave at least 2 of {self.experts} experts in a group"]
        return lines + at_most("top_k", self.top_k, "experts in group_limit groups", self.group_limit * size)
