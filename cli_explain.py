"""`plait explain`: what every way to split a model's tokens costs, and which one is chosen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_output import Table, fail_cleanly, problem, show, write_json

if TYPE_CHECKING:
    from plait.ir import Graph
    from plait.passes.plan import Choice, Plan
    from plait.passes.pricing import Offer
    from plait.passes.traffic import Sum

Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A preset's name, a .toml, .json or .ir file, or - for stdin.")]
MeshText = Annotated[str, typer.Option("--mesh", help="Named axes and their ranks; tokens are split over cp: cp=8,tp=2.")]
MachineName = Annotated[str, typer.Option("--machine", help="A name such as h200, or a .toml file, as calibrate writes.")]
Sums = dict[tuple[str, str], "Sum"]  # by layer and mesh axis
COLUMNS = ("remedy", "order", "forward ms", "with backward", "MB sent", "messages", "MB copied", "balance", "what")
ASSUMED = (
    "MB sent: by the rank that sends most, in a forward pass; a backward sends as much again. "
    "balance: the busiest rank's arithmetic over the mean. Nothing is assumed to overlap."
)


def mount(app: typer.Typer) -> None:
    """Add `explain`."""
    app.command("explain")(explain)


@fail_cleanly
def explain(
    spec: Spec,
    mesh: MeshText = "cp=2",
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 4096,
    machine: MachineName = "h200",
    batch: Annotated[int, typer.Option(min=1, help="Sequences that the ranks of one cp group work on.")] = 1,
    lengths: Annotated[str, typer.Option(help="Lengths of packed segments that add up to --seq: 1000,24.")] = "",
    ways: Annotated[str, typer.Option(help="Remedies to take, by layer: 'self_attention=ring gdn=chain:natural'.")] = "",
    axis: Annotated[str, typer.Option(help="The mesh axis that tokens are split over.")] = "cp",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Price every way to split a model's tokens over a mesh, and say which is chosen, which comes next, and why."""
    from plait.ir import PlaitError, parse_mesh
    from plait.passes.machine import load_machine
    from plait.passes.plan import plan

    forced, segments = _ways(ways), _lengths(lengths)
    where, host = parse_mesh(mesh), load_machine(machine)
    program = _program(spec, bool(segments))

    def best(reorders: bool) -> Plan:
        return plan(program, where, host, batch, seq, axis=axis, lengths=segments, ways=forced, reorders=reorders)

    made, mixed, sums = best(False), best(True), Sums()
    try:
        sums, why = counted(program, made), ""
    except PlaitError as error:
        why = str(error)
    write_json(facts(made, mixed, sums, why)) if as_json else show(tables(made, mixed, sums, why))


def counted(program: Graph, made: Plan) -> Sums:
    """What the program exchanges that the plan makes of it, by layer and mesh axis, in a forward pass."""
    from plait.passes import Pipeline
    from plait.passes.traffic import by_axis, traffic

    at, mesh = made.setting, dict(made.setting.mesh.axes)
    placed = Pipeline.parse(made.pipeline).run(program)
    lead = next(v.type for v in program.inputs if len(v.type.dims) > 1)
    sizes = dict.fromkeys((s for g in (placed, *placed.callees) for s in g.symbols), len(at.lengths))
    both = zip(lead.shape, (at.batch * mesh.get("dp", 1) * mesh.get("ep", 1), at.seq), strict=False)
    return by_axis(placed, traffic(placed, at.mesh, sizes | {str(symbol): size for symbol, size in both}))


def _program(spec: str, packed: bool) -> Graph:
    from plait.cli_compile import read_source

    source = read_source(spec, packed=packed and not spec.lower().endswith(".ir"))
    if source.graph is not None:
        return source.graph
    assert source.spec is not None
    return source.program(source.spec)


def _ways(text: str) -> dict[str, str]:
    """`gdn=chain self_attention=ring` by layer."""
    made = dict[str, str]()
    for part in re.sub(r"\s*,\s*", " ", text).split():
        layer, equals, way = part.partition("=")
        if not equals or not layer or not way or layer in made:
            must = "a layer, =, and a remedy, each layer once, such as 'gdn=chain self_attention=ring'"
            raise problem(f"--ways is {text[:60]!r}; {part[:60]!r} stands where there must be {must}")
        made[layer] = way
    return made


def _lengths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if odd := next((p for p in parts if not re.fullmatch(r"\d{1,12}", p, re.ASCII)), None):
        raise problem(f"--lengths is {text[:60]!r}; {odd[:60]!r} must be a number of tokens, such as 1000,24")
    return tuple(map(int, parts))


# -- for people -------------------------------------------------------------------------------


def tables(made: Plan, mixed: Plan, sums: Sums, why: str) -> list[Table]:
    """One for every distinct layer, one for the whole, one of what is counted; `mixed` may reorder between layers."""
    as_passes = Table((f"as passes: {made.pipeline}",), [(ASSUMED,)])
    return [*(_layer(choice) for choice in made.choices), _whole(made, mixed), _counted(sums, why), as_passes]


def _counted(sums: Sums, why: str) -> Table:
    """Exchanges of the placed program, feed-forward layers and losses too."""
    rows = [(layer, axis, str(s.exchanges), _mb(s.bytes)) for (layer, axis), s in sums.items()]
    title = f"the placed program cannot be made: {why}" if why else "the placed program, counted, all calls together"
    return Table(("layer", "axis", "exchanges", "MB sent"), rows, title)


def _layer(choice: Choice) -> Table:
    calls = f"{choice.calls} call{'s' if choice.calls > 1 else ''}"
    return Table(COLUMNS, [_row(o, _role(o, choice)) for o in choice.offers], f"{choice.layer}, {calls}")


def _role(offer: Offer, choice: Choice) -> str:
    return "chosen" if offer == choice.offer else "runner-up" if offer == choice.runner_up else ""


def _row(offer: Offer, role: str) -> tuple[str, ...]:
    if (p := offer.price) is None:
        return (offer.remedy, offer.order, *["-"] * 6, f"cannot be: {offer.why}")
    times = (f"{p.forward * 1e3:.3f}", f"{p.training * 1e3:.3f}")
    return (offer.remedy, offer.order, *times, _mb(p.sent), str(p.messages), _mb(p.copied), f"{p.balance:.3f}", role)


def _mb(size: float) -> str:
    digits = 6 if 0 < size < 1e4 else 2 if size < 1e9 else 0
    return f"{size / 1e6:.{digits}f}"


def _whole(made: Plan, mixed: Plan) -> Table:
    """The plan in one view: its bytes against the reference system's."""
    at, share = made.setting, f"{made.sent / made.reference:.3f}" if made.reference else "-"
    rows = [
        ("tokens of a rank", f"{at.tokens} of {at.batch * at.seq}, order {made.order}"),
        ("link", f"{at.link.name} of {at.machine.name}: {at.link.latency * 1e6:g} us, {at.link.bandwidth / 1e9:g} GB/s"),
        ("seconds of mixing", f"{made.forward:.6f} forward, {made.training:.6f} with backward"),
        ("MB sent", f"{_mb(made.sent)} a rank forward, {_mb(made.reference)} by Megatron-core: a share of {share}"),
        ("orders by layer", _mixed(made, mixed)),
    ]
    for c in made.choices:
        many = "" if c.reference.exchanges == 1 else "s"
        theirs = f"{_mb(c.reference.sent)} MB in {c.reference.exchanges} exchange{many} a call"
        rows.append((f"Megatron-core's {c.layer}", f"{theirs}: {c.reference.about}"))
    return Table(("the plan", made.ways or "nothing mixes tokens"), rows)


def _mixed(made: Plan, mixed: Plan) -> str:
    """What would be gained if hidden states changed their order between layers."""
    if not mixed.reorders:
        return "one order for all layers is the cheapest"
    turns = f"{mixed.reorders} reorders of hidden states, {_mb(mixed.reorder.sent)} MB each"
    return f"{mixed.ways} in order {mixed.order} would take {mixed.training:.6f} with {turns}"


# -- for scripts ------------------------------------------------------------------------------


def facts(made: Plan, mixed: Plan, sums: Sums, why: str) -> dict[str, Any]:
    """Everything that the tables say, bytes and seconds as numbers."""
    at = made.setting
    return {
        "mesh": dict(at.mesh.axes),
        "axis": at.axis,
        "machine": at.machine.name,
        "link": vars(at.link),
        "batch": at.batch,
        "seq": at.seq,
        "tokens_of_a_rank": at.tokens,
        "order": made.order,
        "ways": made.ways,
        "place": made.place,
        "pipeline": made.pipeline,
        "sent": made.sent,
        "reference_sent": made.reference,
        "seconds": {"forward": made.forward, "training": made.training},
        "orders_by_layer": {
            "order": mixed.order,
            "ways": mixed.ways,
            "training": mixed.training,
            "reorders": mixed.reorders,
            "reorder_sent": mixed.reorder.sent,
        },
        "counted": [{"layer": layer, "axis": axis, **vars(s)} for (layer, axis), s in sums.items()],
        "cannot_be_counted": why,
        "layers": [_layer_facts(choice) for choice in made.choices],
    }


def _layer_facts(choice: Choice) -> dict[str, Any]:
    next_best = choice.runner_up
    return {
        "layer": choice.layer,
        "calls": choice.calls,
        "chosen": {"remedy": choice.offer.remedy, "order": choice.offer.order},
        "runner_up": {"remedy": next_best.remedy, "order": next_best.order} if next_best else None,
        "reference": vars(choice.reference),
        "offers": [_offer_facts(o) for o in choice.offers],
    }


def _offer_facts(offer: Offer) -> dict[str, Any]:
    p = offer.price
    price = {**vars(p), "forward": p.forward, "training": p.training} if p else None
    return {"remedy": offer.remedy, "order": offer.order, "why_not": offer.why, "price": price}
