"""Remedies: what an op that must see whole sequences does when its tokens are split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

from ..ir import Graph, Node, OpDef, PlacementError, TensorType, TypeMismatch, Value, ops
from .splitting import Split, Types

FAMILY = frozenset(op.name for op in ops.FAMILY)
SCANS = frozenset(op.name for op in ops.SCANS)


@dataclass(frozen=True)
class Wanted:
    """The ways that are asked for, of attention and of recurrences; one that is forced is taken or refused."""

    attention: str = "heads"
    recurrence: str = "heads"
    forced: bool = False


@dataclass(frozen=True)
class Site:
    """An op that needs a remedy, in the unplaced graph."""

    graph: Graph
    node: Node
    split: Split
    homes: tuple[TensorType | None, ...] = ()  # where its operands live
    wanted: Wanted = Wanted()

    @property
    def op(self) -> OpDef:
        assert isinstance(self.node.op, OpDef)
        return self.node.op

    @property
    def types(self) -> list[TensorType | None]:
        return [v.type if v is not None else None for v in self.node.inputs]


@dataclass(frozen=True)
class Remedy:
    """One way out: the letter that is split instead of the tokens (none: nothing is), and why it may not be taken."""

    name: str
    ops: frozenset[str]  # empty for every op
    letter: str
    about: str
    refuses: Callable[[Site, str], str]  # the reason, empty where it is legal
    by: str = ""  # the op's own way across, where tokens stay split

    def serves(self, op: OpDef) -> bool:
        return not self.ops or op.name in self.ops

    def targets(self, op: OpDef, types: Types, attrs: Mapping[str, Any], split: Split) -> list[TensorType | None]:
        """Where each operand must live: split along the letter, whole otherwise."""
        made = [split.whole(t) if t is not None else None for t in types]
        for use in op.bind(made, attrs).uses.get(self.letter, ()):
            type_ = made[use.operand]
            assert type_ is not None
            made[use.operand] = split.over(type_, use.position)
        return made


def _undivided(site: Site, letter: str) -> str:
    """The operand whose dim the ranks do not divide."""
    bound = site.op.bind(site.types, site.node.attrs)
    uses = bound.uses[letter]
    if site.split.divides(bound.size[letter], tuple(a for u in uses for a in u.dim.axes)):
        return ""
    use = min(uses, key=lambda u: site.types[u.operand].dims[u.position].size != bound.size[letter])  # type: ignore[union-attr] # it is used
    name, type_ = site.op.inputs[use.operand].name, site.types[use.operand]
    return f"{name} is {type_}; dim {use.position} must be a multiple of {site.split}"


def repeats(site: Site) -> int:
    """How often each key head must stand there so that ranks divide the heads; 0 where they do not even then."""
    bound = site.op.bind(site.types, site.node.attrs)
    if "g" not in bound.size:
        return 1
    g, r, uses = bound.size["g"], bound.size.get("r", 1), bound.uses["g"]
    axes = tuple(a for u in uses for a in u.dim.axes)
    if site.split.divides(g, axes):
        return 1
    if not isinstance(g, int) or not isinstance(r, int):
        return 0
    own = g // prod(site.split.mesh[a] for a in dict.fromkeys(axes) if a in site.split.mesh)
    times = site.split.ranks // gcd(own, site.split.ranks)
    return times if r % times == 0 else 0


def of_keys(op: OpDef) -> list[int]:
    """The operands that have key heads alone: those that are repeated."""
    letters = [{x for a in o.axes for x in a.letters} for o in op.inputs]
    return [i for i, own in enumerate(letters) if "g" in own and "r" not in own]


def _heads(site: Site, letter: str) -> str:
    """Ranks must divide the heads, or key heads that are repeated."""
    if repeats(site):
        return ""
    return f"{_undivided(site, letter)}, or a divisor of it where key heads can be repeated"


def across(op: OpDef, types: Types, attrs: Mapping[str, Any], split: Split, by: str) -> tuple[Types, dict[str, Any]]:
    """Operands and attributes of an op that runs over the split: what has tokens is split along them."""
    made, crossing = [*types], op.crossing
    assert crossing is not None
    for letter, uses in op.bind(types, attrs).uses.items():
        split_here = crossing.crosses(letter) and any(split.axis in u.dim.axes for u in uses)
        for use in uses if split_here else ():
            type_ = made[use.operand]
            if type_ is not None and not split.lives(type_):
                made[use.operand] = split.tokens(type_, use.position)
    return made, {**attrs, "over": split.axis, "by": by, "order": split.order}


def _uncrossed(by: str) -> Callable[[Site, str], str]:
    def refuses(site: Site, letter: str) -> str:
        """What the op's types say of running over the split."""
        if site.op.crossing is None or by not in site.op.crossing.ways:
            return f"{site.op.name} has no way called {by}"
        if site.node.attrs["over"]:
            return f"it runs over {site.node.attrs['over']} already"
        try:
            site.op.infer(*across(site.op, site.homes, site.node.attrs, site.split, by))
        except (PlacementError, TypeMismatch) as error:
            return str(error)
        return ""

    return refuses


def expected(site: Site) -> str:
    """The way that a recurrence will go, as far as its own types say before its operands are placed."""
    for remedy in choices(site.op, site.wanted):
        if remedy.by:
            known = site.op.crossing.ways.get(remedy.by) if site.op.crossing else None
            legal = known is not None and site.split.order.partition("(")[0] in known.orders
        else:
            legal = not remedy.refuses(site, remedy.letter)
        if legal:
            return remedy.name
    return "gather"


def _behind(site: Site) -> dict[str, Node]:
    """The ways of the recurrences that a conv's results reach."""
    return {expected(replace(site, node=n)): n for n in _takers(site.graph, site.node)}


def _sections(site: Site, letter: str) -> str:
    """Channels go with the heads they become, if the sections behind the conv part evenly and recurrences take heads."""
    behind = sections_of(site.graph, site.node)
    if behind is None:
        return "its result is not parted into sections at once, or its states are used"
    takers = _behind(site)
    if not takers:
        return "no recurrence takes its channels"
    if other := next((f"{node.op.name} behind it takes {way}" for way, node in takers.items() if way != "heads"), ""):
        return other
    sizes, axes = behind.attrs["sizes"], behind.inputs[0].type.dims[-1].axes  # type: ignore[union-attr] # split has it
    groups = section_groups(site, behind)
    if groups is None:
        return "key heads must be repeated, and what becomes of them is also used elsewhere"
    if odd := next((n for n, (_, m) in zip(sizes, groups, strict=True) if not site.split.divides(n * m, axes)), None):
        return f"sections of {sizes} channels; {odd} must be a multiple of {site.split}"
    return ""


def section_groups(site: Site, behind: Node) -> list[tuple[int, int]] | None:
    """For each section, its key heads and how often they are repeated (0, 1 where they are not); None where they cannot be."""
    readers = [_only_reader(site.graph, value) for value in behind.outputs]
    found = [_repeated(replace(site, node=n), v) if n is not None else (0, 1) for n, v in readers]
    takers = [replace(site, node=n) for n in _takers(site.graph, behind)]
    wanted = sum(len(of_keys(t.op)) for t in takers if repeats(t) > 1)
    return found if sum(m > 1 for _, m in found) == wanted else None


def _only_reader(graph: Graph, value: Value) -> tuple[Node | None, Value]:
    """The recurrence that alone reads a section, through row-wise ops; None where it is read otherwise."""
    while True:
        users = graph.uses.get(value, ())
        node = users[0] if len(users) == 1 and value not in graph.outputs else None
        if node is None or node.is_op(*FAMILY):
            return node, value
        if not isinstance(node.op, OpDef) or not node.op.row or len(node.outputs) != 1:
            return None, value
        value = node.outputs[0]


def _repeated(site: Site, value: Value) -> tuple[int, int]:
    """The key heads that a recurrence reads from a value, and how often they are repeated."""
    times = repeats(site)
    keys = times > 1 and any(site.node.inputs[i] is value for i in of_keys(site.op))
    return (int(value.type.dims[2].size), times) if keys else (0, 1)


def _halo(site: Site, letter: str) -> str:
    """Not on the way to a recurrence that everything is gathered for: then its channels are gathered once, before it."""
    if node := _behind(site).get("gather"):
        return f"{node.op.name} behind it gathers"
    return _uncrossed("halo")(site, letter)


def _channels(site: Site, letter: str) -> str:
    """As for a halo."""
    if node := _behind(site).get("gather"):
        return f"{node.op.name} behind it gathers"
    return _undivided(site, letter)


def sections_of(graph: Graph, conv: Node) -> Node | None:
    """The split that alone reads a conv which starts and ends without states."""
    y, *final = conv.outputs
    users = graph.uses.get(y, ())
    used = any(v in graph.uses or v in graph.outputs for v in final) or y in graph.outputs
    if used or len(users) != 1 or not users[0].is_op("split") or conv.inputs[3] is not None:
        return None
    return users[0]


def _takers(graph: Graph, start: Node) -> list[Node]:
    """The recurrences that a node's results reach."""
    reached, found = set(start.outputs), list[Node]()
    for node in graph.nodes:
        if not reached.intersection(node.operands):
            continue
        if node.is_op(*FAMILY):
            found.append(node)
        else:
            reached.update(node.outputs)
    return found


CONV = frozenset({"causal_conv1d"})
SUMS = frozenset({"cross_entropy", "linear_cross_entropy", "load_balance_loss", "z_loss"})
PLACES = frozenset({"positions", "dropout", "tokens_of"})
ATTENTION = frozenset({"attention"})
_RELAY = {
    "states": "every rank gets all ranks' summaries of their tokens",
    "scan": "summaries of tokens meet in log2 steps",
    "chain": "the state goes from rank to rank",
}


def _everywhere(site: Site, letter: str) -> str:
    return ""


REMEDIES = (
    Remedy("heads", FAMILY | ATTENTION, "g", "each rank has whole sequences of some heads", _heads),
    Remedy("heads", SCANS, "c", "each rank has whole sequences of some channels", _undivided),
    Remedy("kv", ATTENTION, "", "each rank has all keys and values for its own queries", _uncrossed("kv"), "kv"),
    Remedy("ring", ATTENTION, "", "keys and values pass from rank to rank, queries stay", _uncrossed("ring"), "ring"),
    *(Remedy(name, FAMILY | SCANS, "", about, _uncrossed(name), name) for name, about in _RELAY.items()),
    Remedy("sections", CONV, "c", "channels travel once, with the heads that they become", _sections),
    Remedy("halo", CONV, "", "each rank gets the last tokens before its own", _halo, "halo"),
    Remedy("channels", CONV, "c", "each rank has whole sequences of some channels", _channels),
    Remedy("sums", SUMS, "", "each rank sums over its own tokens", _uncrossed("sums"), "sums"),
    Remedy("here", PLACES, "", "each rank knows where its own tokens stand", _uncrossed("here"), "here"),
    Remedy("gather", frozenset(), "", "each rank has all tokens and does all the work", _everywhere),
)
MIXING = FAMILY | SCANS | ATTENTION | CONV
ATTENTION_WAYS = ("heads", "kv", "ring", "gather")
RECURRENCE_WAYS = ("heads", "states", "scan", "chain", "gather")
# What is tried where the wanted way is not legal.
_ELSE = {"heads": ("kv", "states"), "ring": ("kv",), "scan": ("states",), "chain": ("states",)}


def choices(op: OpDef, wanted: Wanted) -> list[Remedy]:
    """The remedies of an op in order of preference; a conv goes as the recurrences do."""
    way = wanted.attention if op.name in ATTENTION else wanted.recurrence
    serving = {r.name: r for r in REMEDIES if r.serves(op)}
    if op.name in ATTENTION | FAMILY | SCANS:
        rest = () if wanted.forced else (*_ELSE.get(way, ()), "gather")
        return [serving[name] for name in (way, *rest) if name in serving]
    if op.name in CONV and way == "gather":
        return [serving["gather"]]
    return [*serving.values()]
