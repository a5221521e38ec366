"""Prices: what each way to run a token mixer over split tokens sends, waits for, computes and copies, or why it cannot be.

Bytes are what the busiest rank sends in a forward pass. A rank's seconds are added up as if nothing overlapped. A backward
sends as many bytes again, in as many messages, and computes twice as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir import Mesh
from ..ir.types import BYTES
from .machine import Link, Machine
from .plan_balance import ORDERS, balance, work
from .plan_crossings import Cut, crossing_bytes, crossing_text, refused
from .plan_sites import Mixer, Moved

PREPASS = {"delta": 0.9, "additive": 0.5}  # a run's effect on the state before it, over the arithmetic of the rule itself


@dataclass(frozen=True)
class Setting:
    """Where a program would run, and on what: `batch` sequences of `seq` tokens for each group of ranks along the axis."""

    machine: Machine
    mesh: Mesh
    axis: str
    batch: int
    seq: int
    lengths: tuple[int, ...] = ()  # of packed segments; none: each sequence is one

    @property
    def ranks(self) -> int:
        return self.mesh[self.axis]

    @property
    def tp(self) -> int:
        """Ranks that share heads already."""
        return dict(self.mesh.axes).get("tp", 1)

    @property
    def tokens(self) -> int:
        """Tokens that a rank holds."""
        return self.batch * self.seq // self.ranks

    @property
    def link(self) -> Link:
        return self.machine.link(self.mesh, self.axis)

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of what is mixed by itself, in one sequence of the batch."""
        return self.lengths or (self.seq,)

    def shared(self, size: int) -> int:
        """What leaves a rank of `size` bytes in equal parts for all."""
        return size * (self.ranks - 1) // self.ranks


@dataclass(frozen=True)
class Price:
    """What a rank pays for a forward pass."""

    sent: int = 0  # bytes, of the rank that sends most
    messages: int = 0  # that are waited for one after the other
    copied: int = 0  # bytes through memory that a whole sequence would not need
    balance: float = 1.0  # the busiest rank's arithmetic over the mean
    wire: float = 0.0  # seconds
    compute: float = 0.0
    memory: float = 0.0

    @property
    def forward(self) -> float:
        """Seconds of a forward pass."""
        return self.wire + self.compute + self.memory

    @property
    def training(self) -> float:
        """Seconds of a forward and a backward pass."""
        return 2 * self.wire + 3 * self.compute + 2 * self.memory

    def __add__(self, other: Price) -> Price:
        made = {k: v + getattr(other, k) for k, v in vars(self).items() if k != "balance"}
        return Price(**made, balance=max(self.balance, other.balance))


@dataclass(frozen=True)
class Offer:
    """A remedy in an order of tokens: its price, or the reason that it cannot be."""

    remedy: str
    order: str
    price: Price | None = None
    why: str = ""


# -- what is common ---------------------------------------------------------------------------


def _priced(at: Setting, sent: int, messages: int, copied: int, compute: float, even: float = 1.0, line: int = 0) -> Price:
    """`line` are the bytes that follow each other on the longest way, where they are not what one rank sends."""
    wire = at.machine.sending(at.link, line or sent, messages)
    return Price(sent, messages, copied, even, wire, compute, at.machine.copying(copied))


def _arithmetic(m: Mixer, at: Setting) -> float:
    """Operations of one rank where work is even: of its heads over all tokens, shared out."""
    if m.kind == "attention":
        options = m.node.attrs
        pairs = sum(work(at.runs, 1, "natural", options["causal"], options["window"]))
        flops = 2.0 * at.batch * pairs * m.result.local(at.tp) * (m.columns("q") + m.columns("v"))
    else:
        types = [v.type if v is not None else None for v in m.node.inputs]
        sizes = dict.fromkeys((s for t in types if t for s in t.symbols), 1)
        token = m.op.flops(types, m.node.attrs, sizes)  # where there is one sequence of one token
        flops = token * at.batch * at.seq * m.result.local(at.tp) / m.heads
    return flops / at.ranks


def _seconds(m: Mixer, at: Setting, times: float = 1.0) -> float:
    return at.machine.computing(_arithmetic(m, at) * times, m.dtype, m.kind)


def _evenness(m: Mixer, at: Setting, order: str) -> float:
    options = m.node.attrs
    return balance(work(at.runs, at.ranks, order, options["causal"], options["window"]))


def _kv(m: Mixer, at: Setting) -> int:
    """Bytes of a rank's keys and values."""
    return at.tokens * sum(x.local(at.tp) * x.bytes for x in m.moved if x.name in ("k", "v"))


def _cut(at: Setting, order: str) -> Cut:
    text = crossing_text(order, at.ranks, bool(at.lengths))
    return Cut(at.axis, at.ranks, text, at.batch, at.seq, len(at.lengths) or at.batch, at.tp)


def _lanes(at: Setting, order: str) -> int:
    """Sequences that cross the same borders: rows of the batch, or segments that are zigzags by themselves."""
    return len(at.lengths) if at.lengths and order == "zigzag" else at.batch


# -- the remedies -----------------------------------------------------------------------------


def _heads(m: Mixer, at: Setting, order: str) -> Price:
    """Tokens for heads and back. A copy packs and one unpacks, each way; a permuted sequence is put in order by a third."""
    into = at.tokens * sum(x.features(at.ranks, at.tp) for x in m.moved)
    back = at.tokens * m.result.features(at.ranks, at.tp)
    copies = 3 if order == "zigzag" and (m.kind == "recurrence" or m.node.attrs["causal"]) else 2
    return _priced(at, at.shared(into) + at.shared(back), 2, copies * 2 * (into + back), _seconds(m, at))


def _gather(m: Mixer, at: Setting, order: str) -> Price:
    """Everything to everyone, and everyone does everything."""
    own = at.tokens * sum(x.local(at.tp) * x.bytes for x in m.read)
    return _priced(at, (at.ranks - 1) * own, at.ranks - 1, 2 * at.ranks * own, _seconds(m, at, at.ranks))


def _gather_kv(m: Mixer, at: Setting, order: str) -> Price:
    """Keys and values to everyone, laid side by side there."""
    even, sent = _evenness(m, at, order), crossing_bytes(m.node, "kv", _cut(at, order))
    return _priced(at, sent, at.ranks - 1, 2 * at.ranks * _kv(m, at), _seconds(m, at, even), even)


def _ring(m: Mixer, at: Setting, order: str) -> Price:
    """Keys and values pass all ranks; after each, what was found is scaled and added to, in the accumulator's width."""
    even, steps = _evenness(m, at, order), at.ranks - 1
    found = at.tokens * m.result.local(at.tp) * m.columns("v") * max(4, BYTES[m.dtype])
    sent = crossing_bytes(m.node, "ring", _cut(at, order))
    return _priced(at, sent, steps, steps * 2 * found, _seconds(m, at, even), even)


def _relay(m: Mixer, at: Setting, order: str, way: str, messages: int, line: int) -> Price:
    """A pass for what each run does to a state, exchanges of summaries, the rule; and the convolution's halo."""
    assert m.traits is not None
    sent, compute = crossing_bytes(m.node, way, _cut(at, order)), _seconds(m, at, 1 + PREPASS[m.traits.update])
    again = at.tokens * sum(x.local(at.tp) * x.bytes for x in m.moved)
    return _priced(at, sent, messages, again + 2 * sent, compute, line=line) + _halo(m, at, order)


def _states(m: Mixer, at: Setting, order: str) -> Price:
    """Every rank's (M, S) to everyone."""
    return _relay(m, at, order, "states", at.ranks - 1, 0)


def _scan(m: Mixer, at: Setting, order: str) -> Price:
    """(M, S) in a logarithmic number of steps; a zigzag goes up and then down."""
    rounds = (at.ranks - 1).bit_length() * (2 if order == "zigzag" else 1)
    line = rounds * _lanes(at, order) * (m.transition(at.tp) + m.state(at.tp))
    return _relay(m, at, order, "scan", rounds, line)


def _chain(m: Mixer, at: Setting, order: str) -> Price:
    """S alone from rank to rank, one after the other; a zigzag goes up and then down."""
    hops = (at.ranks - 1) * (2 if order == "zigzag" else 1)
    return _relay(m, at, order, "chain", hops, hops * _lanes(at, order) * m.state(at.tp))


def _halo(m: Mixer, at: Setting, order: str) -> Price:
    """The last inputs of the run in front of each."""
    return _priced(at, crossing_bytes(m.conv, "halo", _cut(at, order)), 1, 0, 0.0) if m.conv else Price()


# -- legality ---------------------------------------------------------------------------------


def _refuses_heads(m: Mixer, at: Setting, order: str) -> str:
    for name, heads in ((m.result.name, m.heads), ("k", m.groups)):
        local = Moved(name, heads, 0).local(at.tp)
        short = name == "k" and at.ranks % local == 0  # heads are copied
        if local % at.ranks and not short:
            many = f" on each of tp={at.tp}" if at.tp > 1 else ""
            more = ", or divide it" if name == "k" else ""
            return f"{name} of {m.op.name} has {local} heads{many}; they must be a multiple of {at.axis}={at.ranks}{more}"
    return ""


def _other_keys(m: Mixer) -> str:
    """Why attention cannot be priced by its own tokens alone."""
    if m.kind == "recurrence":
        return ""
    if m.given("at") is not None:
        return f"at of {m.op.name} says where its queries stand, as with a cache; it must be absent"
    if m.operand("q").shape[:2] != m.operand("k").shape[:2]:
        return f"k of {m.op.name} is {m.operand('k')}; it must have the tokens of q, {m.operand('q')}"
    return ""


def _refuses(name: str) -> Callable[[Mixer, Setting, str], str]:
    """What the op itself says of a way, and the convolution in front of a recurrence."""

    def refuses(m: Mixer, at: Setting, order: str) -> str:
        cut = _cut(at, order)
        return _other_keys(m) or refused(m.node, name, cut) or (refused(m.conv, "halo", cut) if m.conv else "")

    return refuses


def _never(m: Mixer, at: Setting, order: str) -> str:
    return ""


@dataclass(frozen=True)
class Remedy:
    """A row of the table: which mixers it serves, why it may not be taken, what it costs."""

    name: str
    kinds: tuple[str, ...]
    refuses: Callable[[Mixer, Setting, str], str]
    price: Callable[[Mixer, Setting, str], Price]


REMEDIES = (
    Remedy("heads", ("attention", "recurrence"), _refuses_heads, _heads),
    Remedy("kv", ("attention",), _refuses("kv"), _gather_kv),
    Remedy("ring", ("attention",), _refuses("ring"), _ring),
    Remedy("states", ("recurrence",), _refuses("states"), _states),
    Remedy("scan", ("recurrence",), _refuses("scan"), _scan),
    Remedy("chain", ("recurrence",), _refuses("chain"), _chain),
    Remedy("gather", ("attention", "recurrence"), _never, _gather),
)


def unsplit(at: Setting, order: str) -> str:
    """Why tokens cannot be split in an order."""
    parts = at.ranks * (2 if order == "zigzag" else 1)
    if order == "zigzag" and (odd := next((n for n in at.lengths if n % parts), None)) is not None:
        return f"a segment has {odd} tokens; zigzag needs a multiple of 2 x {at.axis} = {parts}, so pad it"
    if at.seq % parts:
        what = f"2 x {at.axis} = {parts}" if order == "zigzag" else f"{at.axis}={parts}"
        return f"a sequence has {at.seq} tokens; {order} needs a multiple of {what}, so pad it"
    return ""


def offers(mixers: Sequence[Mixer], at: Setting) -> tuple[Offer, ...]:
    """Every remedy in every order for the mixers of a layer, which all take the same."""
    kinds = {m.kind for m in mixers}
    served = [r for r in REMEDIES if kinds <= set(r.kinds)]
    return tuple(_offer(r, mixers, at, order) for r in served for order in ORDERS)


def _offer(remedy: Remedy, mixers: Sequence[Mixer], at: Setting, order: str) -> Offer:
    offer = Offer(remedy.name, order)
    reasons = (_unshared(m, at) or remedy.refuses(m, at, order) for m in mixers)
    if why := unsplit(at, order) or next(filter(None, reasons), ""):
        return replace(offer, why=why)
    return replace(offer, price=sum((remedy.price(m, at, order) for m in mixers), Price()))


def _unshared(m: Mixer, at: Setting) -> str:
    """Why heads cannot be shared out over tp."""
    if m.heads % at.tp:
        return f"{m.result.name} of {m.op.name} has {m.heads} heads; they must be a multiple of tp={at.tp}"
    if m.groups % at.tp and at.tp % m.groups:
        return f"k of {m.op.name} has {m.groups} heads; they must be a multiple of tp={at.tp}, or divide it"
    return ""


def reordering(hidden: int, at: Setting) -> Price:
    """Hidden states of every token from natural order to zigzag or back; a rank keeps what it has of its two chunks."""
    n = at.ranks
    moved = max(len({2 * r, 2 * r + 1} - {r, 2 * n - 1 - r}) for r in range(n))
    size = at.tokens * hidden
    return _priced(at, moved * size // 2, 1, 4 * size, 0.0) if moved else Price()


# -- the reference system ---------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What Megatron-core sends for a layer in a forward pass, or would if it took the layer."""

    sent: int
    exchanges: int
    about: str


def reference(m: Mixer, at: Setting) -> Reference:
    """Attention passes keys and values around; a recurrence exchanges every section of its projection, the gate too."""
    if m.kind == "attention":
        return Reference((at.ranks - 1) * _kv(m, at), at.ranks - 1, "keys and values pass all ranks")
    sections, why = [*m.moved, *([m.gate] if m.gate else []), m.result], _refuses_heads(m, at, "natural")
    widths = (x.local(at.tp) * x.bytes if why else x.features(at.ranks, at.tp) for x in sections)
    sent = sum(at.shared(at.tokens * width) for width in widths)
    about = "each section of the projection by itself, the gate too, and the result back"
    return Reference(sent, len(sections), f"{about}; it would refuse: {why}" if why else about)
