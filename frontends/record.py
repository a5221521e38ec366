"""What every record of a spec is made of: frozen, strict, and complaining in the words of the spec."""

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
WAY = "way across ranks that tokens are split over, as `place` names them; what the pass is told when empty"
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


class Sublayer(Frozen):
    """What every block may say of its place in the residual stream: `skip_scale * x + add_scale * f(norm(x))`."""

    kind: Any = ""  # each kind has a name of its own, and it stands first
    norm_place: Literal["", "before", "after", "both", "stream"] = Field(
        default="", description="where this block is normed; as the model says when empty; `stream`: n + f(n) with n = norm(x)"
    )
    skip_scale: Positive = Field(default=1.0, description="what the residual stream is multiplied by as it passes")
    add_scale: Positive = Field(default=1.0, description="what the block adds to it is multiplied by")


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
