"""A model spec: every size and choice of a hybrid language model, decoder-only or with an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from .encoder import Encoder, stacks_agree
from .kinds import Count, Frozen, NotNegative, Positive, Size, bounded
from .problems import explain, join, refuse, shown
from .sequence import KEYS, MAX_BLOCKS, WAYS, Block, Kind, Reading, read_sequence
from .shared import one_shape

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class ModelSpec(Frozen):
    """A language model: embedding, blocks `x + mixer(norm(x))`, final norm, head; behind an encoder if it has one."""

    name: str = Field(default="model", pattern=NAME, max_length=100, description="letters, digits, '.', '_' and '-'")
    vocab: Size = Field(description="tokens")
    hidden: Size = Field(description="columns of the residual stream")
    blocks: tuple[Block, ...] = Field(strict=False, description="the resolved sequence")
    encoder: Encoder | None = Field(default=None, description="what the blocks' cross attention reads; none when absent")
    stages: tuple[Size, ...] = Field(default=(), strict=False, description="blocks per pipeline stage; none for no borders")
    norm: Literal["rms", "layer"] = Field(default="rms", description="norm before each block and before the head")
    norm_bias: bool = Field(default=True, description="layer norms have a bias")
    norm_weight: bool = Field(default=True, description="norms of blocks and before the head have a weight")
    norm_place: Literal["before", "after", "both"] = Field(
        default="before", description="x + f(norm(x)), x + norm(f(x)), or both, with a norm of its own on either side"
    )
    norm_eps: Positive = Field(default=1e-5, le=1.0, description="epsilon of every norm")
    zero_centered: bool = Field(
        default=False, description="block, final and q/k norm weights are stored minus one; gated norms inside mixers are not"
    )
    tied: bool = Field(default=False, description="the head reuses the embedding")
    embed_scale: Positive = Field(default=1.0, description="embeddings are multiplied by this")
    learned_positions: bool = Field(default=False, description="a table of max_length positions is added to the embeddings")
    position_start: Count = Field(default=0, description="rows of that table in front of the one of the first position")
    residual_scale: Positive = Field(default=1.0, description="what a block adds to the residual stream is multiplied by this")
    logit_scale: Positive = Field(default=1.0, description="logits are multiplied by this, before any softcap")
    logit_softcap: NotNegative = Field(default=0.0, description="logits become c tanh(logit / c); 0 for none")
    head_bias: bool = Field(default=False, description="logits have a bias, which is given and not trained")
    dropout: NotNegative = Field(default=0.0, lt=1.0, description="residual dropout")
    init_std: Positive = Field(default=0.02, description="deviation of the initial weights")
    max_length: Size = Field(default=4096, description="positions up to which the model is meant to be used")
    dtype: Literal["bf16", "f16", "f32", "f64"] = Field(default="bf16", description="default type of the weights")

    def rules(self) -> list[str]:
        lines = bounded("hidden", "2 * hidden", 2 * self.hidden)
        if not 1 <= len(self.blocks) <= MAX_BLOCKS:
            lines.append(f"blocks: has {len(self.blocks)}; must have 1 to {MAX_BLOCKS}")
        lines += one_shape(self.blocks) + stacks_agree(self.blocks, self.encoder)
        if self.position_start and not self.learned_positions:
            lines.append(f"position_start: is {self.position_start}; must be 0 without learned_positions")
        if self.stages and sum(self.stages) != len(self.blocks):
            total = sum(self.stages)
            lines.append(f"stages: sums to {total}; must sum to the number of blocks = {len(self.blocks)}")
        return lines

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_length + self.position_start

    @classmethod
    def of(cls, **fields: Any) -> ModelSpec:
        """A spec from the fields a spec file has: blocks, pattern or ratio, and tables of kinds."""
        return spec_of(fields)


def spec_of(fields: Mapping[Any, Any], subject: str = "spec") -> ModelSpec:
    """A spec from a mapping, or one error listing everything wrong with it."""
    reading = read_sequence(fields)
    problems = reading.problems
    rest: dict[str, Any] = {}
    for key, value in fields.items():
        if not isinstance(key, str):
            problems.append(f"{join(key)}: is no field name; must be text")
        elif key not in KEYS:
            rest[key] = value
    _read_encoder(fields, rest, problems)
    if reading.stages and "stages" in rest:
        problems.append(f"stages: is {shown(rest.pop('stages'))}; must be absent beside '|' in the pattern")
    # Where the blocks are wrong, the other fields are still checked, beside a stand-in.
    blocks = reading.blocks or ({"kind": "mlp", "width": 1},)
    if not reading.blocks:
        rest.pop("stages", None)
    try:
        spec = ModelSpec.model_validate({"stages": reading.stages, **rest, "blocks": blocks})
    except ValidationError as error:
        spec = None
        problems.extend(explain(error, ModelSpec, extra=KEYS[1:]))
    refuse(problems, subject)
    assert spec is not None
    return spec


def _read_encoder(fields: Mapping[Any, Any], rest: dict[str, Any], problems: list[str]) -> None:
    """An encoder's blocks are said as the model's are, with the same tables."""
    inner: Any = rest.get("encoder")
    if not isinstance(inner, dict):
        return
    tables = {k: v for k, v in fields.items() if k in KEYS and k not in WAYS}
    reading: Reading = read_sequence({**tables, **{k: v for k, v in inner.items() if k in WAYS}})
    problems.extend(f"encoder.{line}" for line in reading.problems if line not in problems)
    own = {k: v for k, v in inner.items() if k not in WAYS}
    rest["encoder"] = {**own, "blocks": reading.blocks or ({"kind": "mlp", "width": 1},)}


def named_kinds(spec: ModelSpec) -> dict[str, Kind]:
    """The distinct kinds of a model's blocks, an encoder's not among them."""
    return kinds_of(spec.blocks)


def kinds_of(blocks: Sequence[Kind]) -> dict[str, Kind]:
    """The distinct kinds in order of first appearance, named `gdn`, `attention`, `attention_2`, ..."""
    found: dict[Kind, str] = {}
    counts: dict[str, int] = {}
    for block in blocks:
        if block not in found:
            n = counts[block.kind] = counts.get(block.kind, 0) + 1
            found[block] = block.kind if n == 1 else f"{block.kind}_{n}"
    return {name: block for block, name in found.items()}
