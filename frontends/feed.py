"""Feed-forward kinds: dense, and mixtures of experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .record import Act, Count, NotNegative, Positive, Size, Sublayer, at_most, bounded, default_to, divides


class Mlp(Sublayer):
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


class Moe(Sublayer):
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
    groups: Size = Field(default=1, description="groups of experts; a group scores by the sum of its best")
    group_best: Size = Field(default=2, description="how many of its experts a group scores by")
    group_limit: Size = Field(default=0, description="groups a token may choose from; all of them unless given")
    shared_width: Count = Field(default=0, description="hidden columns of the always-on shared expert; 0 for none")
    shared_gate: bool = Field(default=False, description="sigmoid gate per token on the shared expert")
    bias: bool = Field(default=False, description="bias on the projections of every expert")
    router_bias: bool = Field(default=False, description="bias on the router's logits")
    limit: NotNegative = Field(default=0.0, description="gates are kept below this, what they gate within it; 0 for none")
    gain: Positive = Field(default=1.0, description="the gate's activation is gate * sigmoid(gain * gate) where this is not 1")
    up_shift: float = Field(default=0.0, description="what is added to what the gate multiplies")
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
        if (self.limit or self.gain != 1 or self.up_shift) and not (self.glu and self.act == "silu" and not self.shared_width):
            lines.append("limit, gain and up_shift: must be 0, 1 and 0 but for gated silu experts without a shared one")
        return lines + bounded("width", "2 * width", 2 * self.width)

    def _group_rules(self, size: int) -> list[str]:
        few = f"must leave at least {self.group_best} of {self.experts} experts in a group"
        lines = [] if size >= self.group_best else [f"groups: is {self.groups}; {few}"]
        return lines + at_most("top_k", self.top_k, "experts in group_limit groups", self.group_limit * size)
