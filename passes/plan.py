"""Planning: the cheapest way through all layers, a remedy and an order of tokens for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from ..ir import Graph, Mesh, PassError, PlacementError, mesh_text
from .machine import Machine
from .plan_balance import ORDERS
from .plan_sites import Step, distinct, steps
from .pricing import Offer, Price, Reference, Setting, offers, reference, reordering
from .remarks import suggestion
from .verify import reached

RECURRING = 10  # layers that may each take either order; more of them take one order together


@dataclass(frozen=True)
class Choice:
    """What one distinct layer does, and what it might have done."""

    layer: str
    calls: int
    offer: Offer
    runner_up: Offer | None  # the next best remedy in the same order
    offers: tuple[Offer, ...]  # everything there is, the illegal too
    reference: Reference


@dataclass(frozen=True)
class Plan:
    """A remedy for every layer that mixes tokens, and an order of tokens for each."""

    setting: Setting
    choices: tuple[Choice, ...]
    reorders: int  # times that hidden states change their order between layers
    reorder: Price  # each time

    @property
    def order(self) -> str:
        """The order that tokens come in: the one that most calls run in, the natural one if as many do."""
        calls = {o: sum(c.calls for c in self.choices if c.offer.order == o) for o in ORDERS}
        return max(ORDERS, key=lambda o: calls[o])

    @property
    def ways(self) -> str:
        """`self_attention=ring gdn=chain`; a layer in another order than `order` says so: `gdn=chain:natural`."""
        named = [(c, "" if c.offer.order == self.order else f":{c.offer.order}") for c in self.choices]
        return " ".join(f"{c.layer}={c.offer.remedy}{order}" for c, order in named)

    @property
    def place(self) -> str:
        """The pass with its options, as a pipeline says it; of a plan without reorders."""
        mesh = mesh_text(self.setting.mesh).replace(",", " ")
        axis = "" if self.setting.axis == "cp" else f" axis={self.setting.axis}"
        order = f"{self.order}-packed" if self.setting.lengths and self.order == "zigzag" else self.order
        ways = f" ways='{self.ways}'" if self.ways else ""
        return f"place{{mesh='{mesh}'{axis} order={order}{ways}}}"

    @property
    def pipeline(self) -> str:
        """All passes that make the program whose exchanges are priced: those that travel together are one."""
        return f"{self.place},hoist-exchanges,merge-exchanges{{mesh='{mesh_text(self.setting.mesh).replace(',', ' ')}'}}"

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a forward pass, over all layers."""
        return sum(c.calls * _price(c.offer).sent for c in self.choices) + self.reorders * self.reorder.sent

    @property
    def reference(self) -> int:
        """Bytes that a rank of the reference system sends."""
        return sum(c.calls * c.reference.sent for c in self.choices)

    @property
    def forward(self) -> float:
        """Seconds of the layers' mixing in a forward pass, reorders included."""
        return sum(c.calls * _price(c.offer).forward for c in self.choices) + self.reorders * self.reorder.forward

    @property
    def training(self) -> float:
        """Seconds of a forward and a backward pass."""
        return sum(c.calls * _price(c.offer).training for c in self.choices) + self.reorders * self.reorder.training


def _price(offer: Offer) -> Price:
    assert offer.price is not None
    return offer.price


def plan(
    graph: Graph,
    mesh: Mesh,
    machine: Machine,
    batch: int = 1,
    seq: int = 4096,
    *,
    axis: str = "cp",
    lengths: Sequence[int] = (),
    ways: Mapping[str, str] | None = None,
    reorders: bool = False,
) -> Plan:
    """The cheapest remedy and order for every layer of a program that is whole, by the price of a forward and a backward pass.

    `batch` sequences of `seq` tokens, packed segments of `lengths` if there are any, are split over the ranks of `axis`.
    `ways` forces remedies by layer name: `ring`, or `ring:zigzag`. One layer does the same at every call. Tokens keep one
    order throughout, as `place` wants it, unless hidden states may change theirs between layers (`reorders`).
    """
    _check_whole(graph, axis)
    setting = _setting(mesh, machine, batch, seq, axis, lengths)
    calls, forced = steps(graph), ways or {}
    layers = distinct(calls)
    listed = {s.layer: offers(s.mixers, setting) for s in layers}
    if unknown := next((name for name in forced if name not in listed), None):
        raise PassError(f"ways: no layer called {unknown} mixes tokens; {suggestion(unknown, listed)}")
    allowed = {name: _legal(name, found, forced.get(name, "")) for name, found in listed.items()}
    orders = _route(calls, allowed, setting, reorders)
    best = {name: _best(allowed[name], orders[name]) for name in listed}
    choices = tuple(_choice(s, calls, best[s.layer], listed, setting) for s in layers)
    return Plan(setting, choices, *_turns(calls, orders, setting))


def _check_whole(graph: Graph, axis: str) -> None:
    for g in reached(graph):
        for value in (*g.inputs, *(v for n in g.nodes for v in n.outputs)):
            if axis in value.type.partial or any(axis in d.axes for d in value.type.dims):
                why = f"{value.name} is {value.type}, split over {axis} already"
                raise PassError(f"{graph.name}: {why}; a plan is made of a program that is whole along {axis}")


def _setting(mesh: Mesh, machine: Machine, batch: int, seq: int, axis: str, lengths: Sequence[int]) -> Setting:
    if axis not in mesh:
        known = ", ".join(name for name, _ in mesh.axes) or "none"
        raise PlacementError(f"mesh {mesh_text(mesh) or '()'} has no axis {axis} to split tokens over; its axes are {known}")
    for name, size in (("batch", batch), ("seq", seq)):
        if size < 1:
            raise PlacementError(f"{name} is {size}; must be at least 1")
    if lengths and (sum(lengths) != seq or min(lengths) < 0 or batch != 1):
        told = f"{len(lengths)} segments add up to {sum(lengths)} in a batch of {batch}"
        raise PlacementError(f"lengths: {told}; they must add up to seq={seq}, in a batch of 1")
    return Setting(machine, mesh, axis, batch, seq, tuple(lengths))


def _legal(layer: str, found: Sequence[Offer], forced: str) -> dict[str, list[Offer]]:
    """The offers that may be taken, by order."""
    remedy, _, order = forced.partition(":")
    names = list(dict.fromkeys(o.remedy for o in found))
    if forced and remedy not in names:
        raise PassError(f"{layer}: no remedy called {remedy}; {suggestion(remedy, names)}")
    if order and order not in ORDERS:
        raise PassError(f"{layer}: no order called {order}; there are {', '.join(ORDERS)}")
    asked = [o for o in found if not forced or (o.remedy == remedy and order in ("", o.order))]
    wanted = [o for o in asked if o.price]
    if not wanted:
        reasons = "; ".join(dict.fromkeys(o.why for o in asked))
        rest = ", ".join(dict.fromkeys(o.remedy for o in found if o.price)) or "nothing"
        raise PlacementError(f"{layer}: {forced or 'every remedy'} cannot be: {reasons}; what remains is {rest}")
    return {order: [o for o in wanted if o.order == order] for order in ORDERS}


def _best(allowed: Mapping[str, Sequence[Offer]], order: str) -> Offer:
    """The cheapest; of equals, the first in the table."""
    return min(allowed[order], key=lambda o: _price(o).training)


# -- the path ---------------------------------------------------------------------------------

Allowed = Mapping[str, Mapping[str, Sequence[Offer]]]  # by layer and order
Taken = tuple[tuple[str, str], ...]  # the orders that layers which are called again have taken


def _route(calls: Sequence[Step], allowed: Allowed, setting: Setting, reorders: bool) -> dict[str, str]:
    """The order of every layer, on the shortest path through all calls; either end is free, as data and loss know no order."""
    again = {s.layer for s in calls if sum(s.layer == other.layer for other in calls) > 1}
    free = [ORDERS] if reorders and len(again) <= RECURRING else [(order,) for order in ORDERS]
    found = [path for orders in free if (path := _shortest(calls, allowed, setting, orders))]
    if not found:
        told = ", ".join(f"{name} takes {' or '.join(o for o in ORDERS if by[o])}" for name, by in allowed.items())
        raise PlacementError(f"no order of tokens serves all layers: {told}; give fewer of them a way of their own")
    return min(found, key=lambda path: path[0])[1]


def _shortest(
    calls: Sequence[Step], allowed: Allowed, setting: Setting, orders: Sequence[str]
) -> tuple[float, dict[str, str]] | None:
    """Seconds and orders; a node is a call, its order, and what layers have taken so far."""
    import networkx as nx  # slow to import, and only placed programs ask for it

    ways: Any = nx.DiGraph()
    ways.add_node("start")
    border: list[Any] = ["start"]
    for i, step in enumerate(calls):
        made = dict[Any, None]()
        for node in border:
            for order in orders:
                taken = _taken(node, calls, i, step, order)
                if taken is None or not allowed[step.layer][order]:
                    continue
                turn = reordering(step.hidden, setting).training if node != "start" and node[1] != order else 0.0
                ways.add_edge(node, (i, order, taken), weight=turn + _price(_best(allowed[step.layer], order)).training)
                made[i, order, taken] = None
        border = list(made)
    for node in border:
        ways.add_edge(node, "end", weight=0.0)
    if "end" not in ways:
        return None
    seconds, path = cast("tuple[float, list[Any]]", nx.single_source_dijkstra(ways, "start", "end"))
    return seconds, {calls[node[0]].layer: node[1] for node in path[1:-1]}


def _taken(node: Any, calls: Sequence[Step], i: int, step: Step, order: str) -> Taken | None:
    """What is taken after a call; none where its layer has taken another order before."""
    before = dict[str, str](() if node == "start" else node[2])
    if before.get(step.layer, order) != order:
        return None
    later = {s.layer for s in calls[i + 1 :]}
    return tuple(sorted((name, o) for name, o in {**before, step.layer: order}.items() if name in later))


def _choice(
    step: Step, calls: Sequence[Step], best: Offer, listed: Mapping[str, tuple[Offer, ...]], setting: Setting
) -> Choice:
    found = listed[step.layer]
    others = [o for o in found if o.price and o.order == best.order and o.remedy != best.remedy]
    known = [reference(m, setting) for m in step.mixers]
    total = Reference(sum(r.sent for r in known), sum(r.exchanges for r in known), known[0].about)
    times = sum(s.layer == step.layer for s in calls)
    return Choice(step.layer, times, best, min(others, key=lambda o: _price(o).training, default=None), found, total)


def _turns(calls: Sequence[Step], orders: Mapping[str, str], setting: Setting) -> tuple[int, Price]:
    """How often hidden states change their order, and the price of once."""
    turns = [b for a, b in pairwise(calls) if orders[a.layer] != orders[b.layer]]
    return len(turns), reordering(turns[0].hidden, setting) if turns else Price()
