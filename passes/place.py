"""Placement: the same program with its tokens split over the ranks of a mesh axis."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from ..ir import Graph, Mesh, PassError, PlacementError, TensorType, Value, mesh_text, parse_mesh
from .batch import batches
from .experts import experts
from .machine import Machine, load_machine
from .placing import Known, Placing, Plan
from .plan import plan
from .registry import Outcome, register
from .remarks import Remark
from .remedies import ATTENTION_WAYS, RECURRENCE_WAYS, Wanted
from .splitting import Split
from .tensor import features
from .verify import reached

AUTO = "auto"
ORDERS = ("natural", "zigzag", "zigzag-packed")


# What each axis of a mesh splits, in the order in which they are placed.
AXES: dict[str, tuple[str, Callable[[Graph, Split], Outcome]]] = {
    "tp": ("features", features),
    "ep": ("experts and the batch", experts),
    "dp": ("the batch", batches),
}


@register(
    numerics="reassociates",
    model=True,
    choices={"attention": (*ATTENTION_WAYS, AUTO), "recurrence": (*RECURRENCE_WAYS, AUTO), "order": ORDERS},
)
def place(
    graph: Graph,
    *,
    mesh: str = "cp=2",
    axis: str = "",
    attention: str = "heads",
    recurrence: str = "heads",
    order: str = "natural",
    ways: str = "",
    sequence: bool = False,
    machine: str = "h200",
    batch: int = 1,
    seq: int = 8192,
) -> Outcome:
    """Split a program over a mesh: tokens over `cp`, features over `tp`, the batch over `dp`, experts and batch over `ep`.

    heads: exchange tokens for heads and back. kv, ring: queries stay, keys and values are gathered or pass from rank to rank.
    states, scan, chain: a recurrence's state crosses ranks. gather: everything everywhere. `ways` forces a layer by its name,
    in an order of its own if it says so: 'self_attention=ring:zigzag gdn=chain'. order: zigzag evens causal attention, over
    the row or each packed segment; inputs come in that order then. auto: a plan for `batch` sequences of `seq` tokens on
    `machine` says what `ways` does not. With `axis` that one alone is placed, and splits tokens; with an axis `ring` beside
    `cp` keys and states pass along it, heads are exchanged over cp. With `sequence`, norms and residuals run on tokens that
    are split over `tp` too. Quote a mesh: `place{mesh='dp=2 cp=4'}`; then fuse.
    """
    whole, said = parse_mesh(mesh), list[Remark]()
    if AUTO in (attention, recurrence):
        order, ways = _planned(graph, whole, axis or "cp", load_machine(machine), ways, batch, seq)
        said.append(Remark("passed", AUTO, "", f"order={order} ways='{ways}', planned for {batch} x {seq} tokens on {machine}"))
    made = _others(graph, whole, said, sequence) if not axis else graph
    wanted = Wanted(attention.replace(AUTO, "heads"), recurrence.replace(AUTO, "heads"))
    if "ring" in whole and not axis:
        made = _tokens(made, _split(whole, "ring", order), _around(wanted), "", said)
        order = "natural"
    if tokens := axis or ("cp" if "cp" in whole else ""):
        made = _tokens(made, _split(whole, tokens, order), wanted, ways, said)
    return made, tuple(said)


def _others(graph: Graph, mesh: Mesh, said: list[Remark], sequence: bool) -> Graph:
    """The graph over the axes that split no tokens; with `sequence`, `tp` splits those of norms and residuals."""
    for name in _known(mesh):
        if name in AXES:
            run = partial(features, sequence=sequence) if name == "tp" else AXES[name][1]
            graph, more = run(graph, Split(name, mesh[name], mesh=mesh))
            said += more
    return graph


def _planned(graph: Graph, mesh: Mesh, axis: str, machine: Machine, ways: str, batch: int, seq: int) -> tuple[str, str]:
    """The cheapest order and ways, those in `ways` kept."""
    told = [part.partition("=") for part in ways.replace(",", " ").split()]
    forced = {name: way for name, _, way in told}
    made = plan(graph, mesh, machine, batch, seq, axis=axis, ways=forced, reorders=True)
    return made.order, made.ways


def _known(mesh: Mesh) -> list[str]:
    """The axes of a mesh in the order in which they are placed; one of another name is refused."""
    known = {**{name: what for name, (what, _) in AXES.items()}, "ring": "tokens, around cp", "cp": "tokens"}
    if strange := [name for name, _ in mesh.axes if name not in known]:
        told = ", ".join(f"{name} ({what})" for name, what in known.items())
        raise PlacementError(f"mesh axis {strange[0]}: its name says what it splits; there are {told}")
    return [name for name in known if name in mesh]


def _around(wanted: Wanted) -> Wanted:
    """The ways over the outer of two axes that split tokens, the inner of which exchanges heads."""
    recurrence = wanted.recurrence if wanted.recurrence in ("states", "scan") else "chain"
    return Wanted(wanted.attention if wanted.attention == "kv" else "ring", recurrence)


def _split(mesh: Mesh, axis: str, order: str) -> Split:
    return Split(axis, mesh[axis], _order(order, mesh[axis]), mesh)


def _order(order: str, ranks: int) -> str:
    return {"natural": "", "zigzag": f"zigzag({ranks})", "zigzag-packed": f"zigzag({ranks},packed)"}[order]


def _tokens(graph: Graph, split: Split, wanted: Wanted, ways: str, said: list[Remark]) -> Graph:
    """Tokens over an axis."""
    if placed := next((v for g in reached(graph) for v in _values(g) if split.lives(v.type)), None):
        why = f"{placed.name} is {placed.type}, split over {split.axis} already"
        raise PassError(f"{graph.name}: {why}; place takes a program that is whole along {split.axis}")
    plan = Plan(split, wanted, *_forced(graph, ways, split.ranks))
    return Placing(graph, _inputs(graph, split), plan, Known(), said).run()


def _forced(graph: Graph, ways: str, ranks: int) -> tuple[dict[str, Wanted], dict[str, str]]:
    """What `ways` says: a way for every op of a layer that must see whole sequences, and the order it runs in."""
    found, orders = dict[str, Wanted](), dict[str, str]()
    names, known = sorted({graph.name, *(g.name for g in graph.layers)}), dict.fromkeys((*ATTENTION_WAYS, *RECURRENCE_WAYS))
    for part in ways.replace(",", " ").split():
        name, _, told = part.partition("=")
        way, _, order = told.partition(":")
        if name not in names:
            raise PassError(f"ways: {part!r} names layer {name!r}; there are {', '.join(names)}")
        if way not in known:
            raise PassError(f"ways: {part!r}; a way is one of {', '.join(known)}")
        if order and order not in ORDERS:
            raise PassError(f"ways: {part!r}; an order is one of {', '.join(ORDERS)}")
        found[name] = Wanted(way, way, forced=True)
        orders |= {name: _order(order, ranks)} if order else {}
    return found, orders


def _values(graph: Graph) -> list[Value]:
    return [*graph.inputs, *graph.params, *(v for n in graph.nodes for v in n.outputs)]


def _inputs(graph: Graph, split: Split) -> list[TensorType]:
    """Every input of batch and tokens, split along its tokens; the first input that has both says what they are."""
    lead = next((v for v in graph.inputs if len(v.type.dims) > 1), None)
    if lead is None:
        raise PassError(f"{graph.name}: no input has tokens to split; one must be [batch, tokens, ...], such as i64[b, s]")
    step = split.ranks * (2 if split.order else 1)
    if isinstance(lead.type.dims[1].size, int) and lead.type.dims[1].size % step:
        why = f"dim 1 must be a multiple of {step if split.order else split}; pad it"
        raise PlacementError(f"{graph.name}: {lead.name} is {lead.type}; {why}")
    shape = lead.type.shape[:2]
    return [split.tokens(v.type, 1) if v.type.shape[:2] == shape else v.type for v in graph.inputs]


def placement(mesh: str, options: str = "", ways: str = "") -> str:
    """The stages that split a program over a mesh, as a pipeline says them: placed, then as few exchanges as can be.

    `options` are those of `place`; `ways` are a spec's own, which those in `options` come after.
    """
    axes = parse_mesh(mesh)
    _known(axes)
    told = re.search(r"\bways=(?:'([^']*)'|(\S+))", options)
    forced = " ".join(x for x in (ways, (told[1] or told[2]) if told else "") if x)
    rest = options.replace(told[0], "") if told else options
    quoted = mesh_text(axes).replace(",", " ")
    given = " ".join([f"mesh='{quoted}'", *rest.split(), *([f"ways='{forced}'"] if forced else [])])
    stages = [f"place{{{given}}}"]
    stages += [f"move-reorders{{mesh='{quoted}'}}"] if "cp" in axes and ":" in forced else []  # layers in other orders
    if "cp" in axes:
        stages += ["hoist-exchanges", f"merge-exchanges{{mesh='{quoted}'}}", "fold-orders"]
    return ",".join(stages)
