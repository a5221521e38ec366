"""The named fusions, as data: patterns in IR text, and regions that flow into an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir import Graph, ops
from .match import CLASSES, Match, Pattern

RECURRENCES = tuple(op.name for op in ops.FAMILY)


@dataclass(frozen=True)
class TextFusion:
    """A pattern whose match becomes a kernel; the longest text that fits is taken.

    Values in `kept` may be read elsewhere too. Reshapes in front of it and behind it, used nowhere else, join.
    """

    name: str
    texts: tuple[str, ...]
    kept: tuple[str, ...] = ()
    reshapes: bool = True
    when: Callable[[Graph, Match], str] | None = None  # why it does not apply, or nothing


@dataclass(frozen=True)
class FlowFusion:
    """What flows into some operands of an op, back through row-wise ops and past the ops named in `through`."""

    name: str
    into: tuple[str, ...]
    operands: tuple[str, ...]
    through: tuple[str, ...]
    stops: tuple[str, ...] = ()  # these join, and what is before them does not
    kernel: str = ""  # the kernel's name where it is not the fusion's
    beside: FlowFusion | None = None  # what flows into other operands of the op, by the same launch where rows are whole


Fusion = TextFusion | FlowFusion


def _gates_a_mixer(graph: Graph, found: Match) -> str:
    """The other factor is the result of attention or a recurrence, heads merged or not."""
    value = found.values["o"]
    while (maker := graph.makers.get(value)) is not None and maker.is_op("reshape"):
        value = maker.operands[0]
    made = maker is not None and maker.is_op("attention", "cached_attention", "paged_attention", *RECURRENCES)
    return "" if made else "what is gated is not the result of attention or a recurrence"


def _has_two_branches(graph: Graph, found: Match) -> str:
    """Gate and value are parts of one projection, or each has its own."""
    makers = [graph.makers.get(found.values[n]) for n in ("g", "u")]
    made = all(m is not None and m.is_op("split", "linear", "grouped_linear") for m in makers)
    return "" if made else "gate and value do not come from a split or from projections"


NORM_GATE = TextFusion(
    "norm-gate",
    (
        """
        d = scale_heads(v, D)
        a = add(o, d)
        r = reshape(a)
        s = activation(z)
        m = mul(r, s)
        y = norm(m)
        """,
        """
        s = activation(z)
        m = mul(o, s)
        y = norm(m)
        """,
        """
        n = norm(o)
        s = activation(z)
        y = mul(n, s)
        """,
    ),
)

OUTPUT_GATE = TextFusion("output-gate", ("s = sigmoid(g)\ny = mul(o, s)",), when=_gates_a_mixer)

SKIP = TextFusion("skip", ("d = scale_heads(v, D)\ny = add(o, d)",))

RESIDUAL_NORM = TextFusion("residual-norm", ("r = add(x, d)\nn = norm(r)",), kept=("r",), reshapes=False)

GLU = TextFusion(
    "glu",
    (
        """
        g, u = split(x)
        s = activation(g)
        y = mul(s, u)
        """,
        """
        u, g = split(x)
        s = activation(g)
        y = mul(s, u)
        """,
        """
        s = activation(g)
        y = mul(s, u)
        """,
    ),
    when=_has_two_branches,
)

QKV_PREP = FlowFusion(
    "qkv-prep",
    into=("attention", "cached_attention", "paged_attention"),
    operands=("q", "k", "v"),
    through=("split", "reshape", *CLASSES["norm"], "rope", "cast", "widen", "scale", "silu", "relu", "add_bias"),
)

GATES = FlowFusion(
    "recurrence-preamble",
    kernel="gates",
    into=RECURRENCES,
    operands=("decay", "beta", "slope"),
    through=(
        "widen", "cast", "add_bias", "softplus", "clamp", "neg_exp", "scale", "scale_columns", "scale_heads", "scale_rows",
        "sigmoid", "softcap", "reshape", "add", "mul",
    ),
)  # fmt: skip

PREAMBLE = FlowFusion(
    "recurrence-preamble",
    kernel="preamble",
    into=RECURRENCES,
    operands=("q", "k", "v"),
    through=(*QKV_PREP.through, "causal_conv1d"),
    stops=("causal_conv1d",),
    beside=GATES,
)

# Order decides who gets a node that two could have: a mixer's end before the plain gate, the gate before the plain norm.
FUSIONS: tuple[Fusion, ...] = (NORM_GATE, OUTPUT_GATE, SKIP, GLU, PREAMBLE, GATES, QKV_PREP, RESIDUAL_NORM)
NAMES = tuple(dict.fromkeys(f.name for f in FUSIONS))
TEXTS = tuple(text for f in FUSIONS if isinstance(f, TextFusion) for text in f.texts)
PATTERNS: dict[str, Pattern] = {text: Pattern.of(text, loose=True) for text in TEXTS}
