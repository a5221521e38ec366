"""Known mistakes of placed programs, planted one at a time, and what catches each: `python -m tests.mutants` prints the table.

types      the program cannot be written down: placing, reading or inferring it refuses
operands   an op refuses, as the program runs, what a rank would give it
lockstep   ranks ask each other for different things
values     a result differs from that of one device, or between ranks that should have the same
gradients  results are right, a gradient is not
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from plait.ir import Graph, PlaitError, dump, ops, orders, parse
from plait.ir.crossing import Exchange, Gather, Here, Hop
from plait.ir.ways import attention, recurrence
from plait.passes import check_types, placing, validate

from tests import mutant_plants as m
from tests.mutant_plants import Edit, Entry, Left, OtherWay, Patch, Plant, asks, hears
from tests.mutant_programs import PROGRAMS, Program

KINDS = ("types", "operands", "lockstep", "values", "gradients")
CALLS = sys.modules["plait.ir.op"]  # a face of ir has the name of this module for its decorator
LINEAR_LOSS, CONV = ops.linear_cross_entropy, ops.causal_conv1d
_PARTED = r"(\w+), (\w+), (\w+) = (split\(\w+, sizes=\(11, 1, 1\))"
_STORED = r"(sections\(2,6),6,10,((?:.|\n)*sections\(2,6),6,10,"

# name, program, what is planted, what catches it
_TABLE: list[tuple[str, str, Plant, str]] = [
    # order
    ("tokens of one input in another order", "heads, zigzag", Edit(r"(tokens: i64\[b, s@cp):zigzag\(2\)", r"\1"), "types"),
    ("an op told that zigzag tokens are natural", "ring, zigzag", Edit(r"(by='ring'), order='zigzag\(2\)'", r"\1"), "types"),
    ("a zigzag of other ranks", "ring, zigzag", Edit(r"(by='ring', order='zigzag)\(2\)", r"\1(4)"), "types"),
    ("no undo of a zigzag before a recurrence", "delta heads, zigzag", Edit(r"decay2, beta2\)", "decay1, beta2)"), "types"),
    ("no undo of a zigzag before a conv", "delta heads, zigzag", Left("reorder"), "types"),
    ("no redo of a zigzag behind attention", "heads, zigzag", Left("reorder", "a"), "types"),
    ("redo in place of undo", "heads, zigzag", Edit(r"reorder\(q2, was=", "reorder(q2, order="), "types"),
    ("an undo that only renames", "heads, zigzag", Edit(r"reorder\(q2, was=", "relabel(q2, dim=1, was="), "values"),
    ("the later chunk of a rank first", "delta chain, zigzag", Patch(orders, "_chunks", m.late_first), "values"),
    ("tokens that arrive and are not sorted", "exchange", OtherWay(ops.reorder, "exchange", hears(m.turned)), "values"),
    # what moves
    ("a sum over ranks left out", "mlp", Left("all_reduce"), "types"),
    ("a sum over ranks taken twice", "mlp", Edit(r"add_bias\(y1, bias\)", "all_reduce(y1, axis='tp')"), "types"),
    ("a bias added before the sum", "mlp", Edit(r"linear\(m, c\)", "linear(m, c, bias)"), "types"),
    ("an activation before the sum", "words", Left("all_reduce"), "types"),
    ("all_gather of the wrong dim", "gather", Edit(r"(all_gather\(q, axis='cp', dim)=1", r"\1=2"), "types"),
    ("all_to_all the wrong way", "heads", Edit(r"(\(a, axis='cp'), src=2, dst=1", r"\1, src=1, dst=2"), "types"),
    ("an exchange left out", "heads", Left("all_to_all"), "types"),
    ("tokens scattered in place of features", "mlp, sequence", Edit(r"(reduce_scatter\(y.*dim)=1", r"\1=2"), "types"),
    ("reduce_scatter of what is whole already", "gather", Edit(r"shard\(d_q, ", "reduce_scatter(d_q, "), "types"),
    ("a gradient's sum left out", "mlp, back", Left("all_reduce", r"d_\w+"), "types"),
    ("a weight's gradient called whole", "gather", Entry(ops.outer.roles, "...", "map"), "values"),
    ("taps' gradients called whole", "conv, back", Patch(ops.conv1d_taps, "crossing", m.called_whole), "values"),
    ("a sum over another axis", "two axes", Edit(r"all_reduce\(z, axis='tp'\)", "all_reduce(z, axis='cp')"), "types"),
    ("a way over another axis", "two axes", Edit(r"over='cp', by='ring'", "over='tp', by='ring'"), "types"),
    ("an exchange read before its end", "overlap", Left("end_all_to_all", "decay1"), "types"),
    # sections and heads
    ("what travels together parted wrongly", "packed features", Edit(_PARTED, r"\1, \3, \2 = \4"), "values"),
    ("rows stored in order, read as natural", "packed features", Edit(r"(w: f64\[26):sections\([\d,]*\)", r"\1"), "types"),
    ("rows stored in the order of other sections", "packed features", Edit(_STORED, r"\1,10,6,\2,10,6,"), "values"),
    ("sections swapped in a parameter", "mlp", Edit(r"sections\(2,8,8,4\)", "sections(2,8,4,8)"), "types"),
    ("sections forgotten in a parameter", "mlp", Edit(r":sections\(2,8,8,4\)", ""), "types"),
    ("sections cut as one plain slice", "mlp", Patch(orders, "_of_sections", m.side_by_side), "values"),
    ("sections packed in another order", "delta heads", Edit(r"concat\(y3, y4\)", "concat(y4, y3)"), "values"),
    ("taps cut without their sections", "delta heads", Patch(placing.Pack, "packed", m.in_slices), "values"),
    ("key heads tiled, not repeated", "heads, one key head", Patch(ops.repeat_heads, "reference", m.tiled), "values"),
    ("sinks of all heads", "heads", Edit(r"sinks1\)", "sinks)"), "types"),
    ("a vocabulary without its rank's offset", "words", OtherWay(ops.embedding, "vocabulary", m.as_first), "values"),
    # places
    ("a causal mask by local places", "ring", Patch(Here, "tokens", m.counted_here), "values"),
    ("positions from 0 on every rank", "ring", OtherWay(ops.positions, "here", m.alone), "values"),
    ("dropout by local places", "dropout", OtherWay(ops.dropout, "here", m.alone), "values"),
    ("borders divided by ranks", "delta chain, packed", Patch(recurrence, "runs_of", m.divided), "operands"),
    ("borders cut to a rank's tokens", "delta chain, packed", Patch(recurrence, "runs_of", m.cut_borders), "values"),
    ("borders left out", "ring, packed", Edit(r", cu, over='cp', by='ring'", ", over='cp', by='ring'"), "values"),
    # attention
    ("parts merged without their denominators", "ring", Patch(attention, "_merged", m.mean_of_parts), "values"),
    ("keys sent round the wrong way", "ring, four ranks", OtherWay(ops.attention, "ring", asks(m.backwards)), "values"),
    ("the same keys seen twice", "ring", OtherWay(ops.attention, "ring", hears(m.own)), "values"),
    ("parts skipped that are seen in part", "ring, zigzag", Patch(attention.Asked, "near", m.whole_or_nothing), "values"),
    ("gathered keys in another order", "kv", OtherWay(ops.attention, "kv", hears(m.turned)), "values"),
    ("gradients of own keys alone", "kv", OtherWay(ops.attention, "kv", hears(m.nearer)), "gradients"),
    ("a rank that needs nothing asks for nothing", "ring", OtherWay(ops.attention, "ring", m.first_alone), "lockstep"),
    ("keys of one rank in half the bytes", "ring", OtherWay(ops.attention, "ring", asks(m.halved)), "lockstep"),
    ("ranks that shift in both directions", "ring", OtherWay(ops.attention, "ring", asks(m.backwards_but_first)), "lockstep"),
    # recurrences and convolutions
    ("a recurrence over split tokens without a way", "delta states", Edit(r", over='cp', by='states'", ""), "types"),
    ("a state that does not cross", "ssd chain", OtherWay(ops.ssd, "chain", hears(m.nothing, Hop)), "values"),
    ("states of other ranks", "delta states", OtherWay(ops.gated_delta_rule, "states", hears(m.turned, Gather)), "values"),
    ("a state that goes to another rank", "ssd chain, four ranks", OtherWay(ops.ssd, "chain", asks(m.further, Hop)), "values"),
    ("a state that has passed its place already", "delta states", Entry(recurrence.EXCHANGES, "states", m.inclusive), "values"),
    ("summaries put together the wrong way round", "delta scan, four ranks",
     Patch(recurrence.Affine, "after", m.the_other_way_round), "values"),
    ("a transition that is transposed", "delta chain, zigzag", Patch(recurrence, "_applied", m.of_transposed), "values"),
    ("a state that passes and does not fade", "ssd chain, four ranks", Patch(recurrence, "_fades", m.unfaded), "values"),
    ("gradients of others' summaries left out", "delta states",
     OtherWay(ops.gated_delta_rule, "states", hears(m.nearer, Gather)), "gradients"),
    ("a recurrence's gradient without a way", "delta states, back", Edit(r"(rule_backward.*), over=.*\)", r"\1)"), "types"),
    ("a halo left out", "conv", OtherWay(CONV, "halo", hears(m.nothing)), "values"),
    ("a halo of the wrong neighbour", "conv", OtherWay(CONV, "halo", asks(m.backwards)), "values"),
    ("a conv over split tokens without a way", "conv", Edit(r", over='cp', by='halo'", ""), "types"),
    ("a gradient's halo left out", "conv, back", OtherWay(ops.anticausal_conv1d, "halo", hears(m.nothing)), "gradients"),
    ("taps' gradients without the halo", "conv, back", OtherWay(ops.conv1d_taps, "halo", hears(m.nothing)), "gradients"),
    # experts and batches
    ("rows sent back to other ranks", "experts", OtherWay(ops.return_rows, "exchange", hears(m.turned, Exchange)), "values"),
    ("rows for other experts", "experts", OtherWay(ops.send_rows, "exchange", hears(m.turned, Exchange)), "values"),
    ("counts of own rows for those that came", "experts", Left("reduce_scatter", "counts"), "types"),
    ("a mean over own labels alone", "batch", Left("all_reduce", "y3"), "types"),
    # losses
    ("a mean of ranks' means", "loss", OtherWay(LINEAR_LOSS, "sums", m.means), "values"),
    ("ignored labels counted", "loss", OtherWay(LINEAR_LOSS, "sums", m.all_labels), "values"),
    ("a loss of own tokens alone", "loss", OtherWay(LINEAR_LOSS, "sums", hears(m.own)), "values"),
    ("a loss over split tokens without a way", "loss", Edit(r", over='cp', by='sums'", ""), "types"),
    ("a whole loss's cotangent added by every rank", "loss, back", Patch(CALLS, "seeds", m.added_by_all), "gradients"),
    ("shares and scores multiplied before the sum", "balance",
     OtherWay(ops.load_balance_loss, "sums", m.balanced_alone), "values"),
    ("the largest logit of own words alone", "head", OtherWay(ops.linear_token_losses, "vocabulary",
     hears(m.own_of_all, Gather)), "values"),
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A mistake, the program that it is planted in, and what must catch it."""

    name: str
    program: str
    plant: Plant
    caught: str


MUTANTS = [Mutant(*row) for row in _TABLE]


def verdict(mutant: Mutant) -> tuple[str, str]:
    """What catches a mistake, and what it says; nothing where nothing does."""
    program, plant = PROGRAMS[mutant.program], mutant.plant
    if isinstance(plant, Edit | Left):
        text = plant(dump(program.after()))
        return judged(program, lambda: parse(text))
    with plant():
        return judged(program, program.after)


def judged(program: Program, make: Callable[[], Graph]) -> tuple[str, str]:
    """What refuses the placed program that is made, or finds it different, and what it says."""
    try:
        after = make()
        check_types(after)
    except PlaitError as error:
        return "types", str(error)
    try:
        report = validate(program.before, after, "reassociates", gradients=program.back)
    except PlaitError as error:
        return _refused(str(error)), str(error)
    if report.ok and report.rows:
        return "", str(report)
    wrong = [row.what for row in report.rows if not row.ok]
    return "gradients" if wrong and not any(w.startswith("result") for w in wrong) else "values", str(report)


def _refused(said: str) -> str:
    """Which kind of refusal it is, of a program that runs."""
    kinds = {"ranks ask for different things": "lockstep", "hold different values": "values"}
    return next((kind for text, kind in kinds.items() if text in said), "operands")


def main() -> int:
    """Print what catches every mistake; how many are not caught as they should be."""
    failures = 0
    for mutant in MUTANTS:
        kind, said = verdict(mutant)
        failures += kind != mutant.caught
        wrong = "" if kind == mutant.caught else f"   must be caught by {mutant.caught}"
        print(f"{mutant.name:46} {mutant.program:23} {kind or 'NOTHING':10} {said.splitlines()[0][:110]}{wrong}")
    print(f"{len(MUTANTS)} mistakes, {failures} not caught as they should be")
    return failures


if __name__ == "__main__":
    sys.exit(min(1, main()))
