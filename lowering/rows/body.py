"""The body of one section's function: its axes, its loops, and what it stores."""

from __future__ import annotations

from .expr import Expr, walk
from .index import Axis
from .pieces import Store
from .tiles import REPEATS, Section
from .write import Writer


def section_lines(w: Writer) -> list[str]:
    """Every line of the function; `w` then knows which arguments it names."""
    s = w.section
    head = _axes(w)
    for i, store in enumerate(s.piece.stores):
        if store.sums and not _visits(w, store):
            w.head.append(f"sum{i} = tl.zeros({_sum_shape(w, store)}, tl.float32)")
    for depth in range(1, _deepest(s) + 1):
        _phase(w, depth)
    _stores(w)
    units, tails = _units(w), _tails(w) if s.summing else []
    if w.alone:
        head.append(f"i_0 = tl.zeros({[1] * (1 + len(s.inner))}, tl.int64)")
    if not s.repeats:
        return [*head, *units, *w.head, *w.body]
    loop = f"for i_b in range(pid, {_blocks(w)}, {w.use('g')}):"
    if not s.summing:
        loop = f"for i_b in range(pid * {REPEATS}, tl.minimum(pid * {REPEATS} + {REPEATS}, {_blocks(w)})):"
    return [*head, *w.head, loop, *_indented([*units, *w.body]), *tails]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {x}" for x in lines]


# -- axes ---------------------------------------------------------------------------------


def _axes(w: Writer) -> list[str]:
    """Places along the inner axes; along one that programs share, this program's part."""
    s, lines = w.section, list[str]()
    for axis in s.inner:
        if axis == s.chunk and s.looped:
            continue
        start = ""
        if axis == s.chunk:
            lines += [f"i_k = pid % {s.chunks}", f"pid = pid // {s.chunks}"]
            start = f"i_k * {s.block} + "
        lines += _axis(w, axis, start)
    return lines


def _axis(w: Writer, axis: Axis, start: str) -> list[str]:
    spread = w.spread(w.place(axis))
    lines = [f"{axis.name} = ({start}tl.arange(0, {w.section.width(axis)})).to(tl.int64){spread}"]
    return lines + ([f"m_{axis.name} = {axis.name} < {axis.size}"] if w.masked(axis) else [])


def _units(w: Writer) -> list[str]:
    """Which row, and which of the columns that need not stand together, each unit is."""
    s = w.section
    if not s.outer:
        return []
    block = "i_b" if s.repeats else "pid"
    lines = [f"i_u = ({block} * {s.units} + tl.arange(0, {s.units})){w.spread(0)}", f"m_u = i_u < {_count(w)}"]
    rest = "i_u"
    for i, axis in enumerate(reversed(s.outer)):
        last = i == len(s.outer) - 1
        lines.append(f"{axis.name} = ({rest}{'' if last else f' % {_size(w, axis)}'}).to(tl.int64)")
        if not last:
            rest = f"({rest} // {_size(w, axis)})" if rest != "i_u" else f"i_u // {_size(w, axis)}"
            rest = f"({rest})" if not rest.startswith("(") else rest
    return lines


def _size(w: Writer, axis: Axis) -> str:
    return str(axis.size) if isinstance(axis.size, int) else w.use(w.sizes[axis.size])


def _count(w: Writer) -> str:
    return " * ".join(_size(w, a) for a in w.section.outer) or "1"


def _blocks(w: Writer) -> str:
    return f"tl.cdiv({_count(w)}, {w.section.units})"


# -- sums along a row that is visited in parts --------------------------------------------


def _depth(s: Section, e: Expr, known: dict[Expr, int]) -> int:
    for x in walk([e]):
        if x not in known:
            inside = max((known[a] for a in x.args), default=0)
            known[x] = inside + (x.op == "sum" and s.chunk in x.params)
    return known[e]


def _deepest(s: Section) -> int:
    if not s.looped:
        return 0
    known = dict[Expr, int]()
    return max(_depth(s, store.expr, known) for store in s.piece.stores)


def _phase(w: Writer, depth: int) -> None:
    """One visit of the row: every sum that needs only the sums of earlier visits."""
    s, known = w.section, dict[Expr, int]()
    exprs = walk([store.expr for store in s.piece.stores])
    wanted = [e for e in exprs if e.op == "sum" and s.chunk in e.params and _depth(s, e, known) == depth]
    w.part, w.local = list[str](), dict[Expr, str]()
    sums = list[tuple[Expr, str]]()
    for e in wanted:
        value, name = w.text(e.args[0]), f"a{w.count}"
        w.count += 1
        masks = w.outside(e)
        w.body.append(f"{name} = tl.zeros({w.shape(e.args[0].axes)}, tl.float32)")
        w.part.append(f"{name} += " + (f"tl.where({masks}, {value}, 0.0)" if masks else value))
        sums.append((e, name))
    _loop(w)
    for e, name in sums:
        w.line(e, w.total(e, name, masked=True))


def _loop(w: Writer) -> None:
    """The lines of this part, in a loop along the chunked axis."""
    s, part = w.section, w.part or []
    w.part, w.local = None, dict[Expr, str]()
    if part and s.chunk is not None:
        w.body.append(f"for i_k in range(0, {s.chunk.size}, {s.block}):")
        w.body += _indented([*_axis(w, s.chunk, "i_k + "), *part])


# -- stores -------------------------------------------------------------------------------


def _stores(w: Writer) -> None:
    if w.section.looped:
        w.part = list[str]()
    for i, store in enumerate(w.section.piece.stores):
        if store.sums:
            _accumulate(w, store, f"sum{i}")
        else:
            w.store(store)
    if w.section.looped:
        _loop(w)


def _kept(w: Writer, store: Store) -> list[Axis]:
    """The inner axes whose places stay apart in a sum over rows."""
    axes = frozenset[Axis]().union(*(i.axes for i in store.where))
    return [a for a in w.section.inner if a in axes]


def _sum_shape(w: Writer, store: Store) -> list[int]:
    """A sum is kept per place of the tile, and added up once, behind the loop."""
    return [w.section.units if w.section.outer else 1, *w.shape(store.expr.axes)[1:]]


def _visits(w: Writer, store: Store) -> bool:
    """Whether its sums are too many to keep: they stay in memory, one part of the row after another."""
    return w.section.looped and w.section.chunk in _kept(w, store)


def _accumulate(w: Writer, store: Store, name: str) -> None:
    """Add this block of rows to a sum over rows."""
    value = w.text(store.expr)
    if not store.expr.axes:
        value = f"({value} + {w.point(frozenset())[0]}.to(tl.float32))"
    masks = (["m_u"] if w.section.outer else []) + [f"m_{a.name}" for a in _along(w, store) if w.masked(a)]
    if masks:
        value = f"tl.where({' & '.join(masks)}, {value}, 0.0)"
    if not _visits(w, store):
        w.body.append(f"{name} += {value}")
        return
    pointer, mask = _pointer(w, store)
    inside = " & ".join(x for x in (mask, "(i_b > pid)") if x)
    assert w.part is not None
    w.part += [
        f"p_a = {pointer}",
        f"v_a = {_added(w, store, value)} + tl.load(p_a, mask={inside}, other=0.0)",
        "tl.debug_barrier()",
        f"tl.store(p_a, v_a{f', mask={mask}' if mask else ''})",
    ]


def _along(w: Writer, store: Store) -> list[Axis]:
    """The inner axes that a sum runs along."""
    kept = _kept(w, store)
    return [a for a in w.section.inner if a in store.expr.axes and a not in kept]


def _added(w: Writer, store: Store, value: str) -> str:
    """A tile added up over its units and along the axes that are not kept."""
    for axis in reversed(_along(w, store)):
        value = f"tl.sum({value}, axis={w.place(axis)}, keep_dims=True)"
    value = f"tl.sum({value}, axis=0, keep_dims=True)"
    kept = _kept(w, store)
    for axis in (a for a in w.section.inner if a in store.domain and a not in store.expr.axes and a not in kept):
        value = f"{value} * {axis.size}.0"
    return value


def _pointer(w: Writer, store: Store) -> tuple[str, str]:
    """Where this program keeps a sum over rows, and the mask of its places."""
    slot = w.slots[str(store.target)]
    start = f"{w.use('p_s')} + pid.to(tl.int64) * {w.row} + {slot.offset}"
    masks = [f"m_{a.name}" for a in _kept(w, store) if w.masked(a)]
    point = w.point(frozenset[Axis]().union(*(i.axes for i in store.where)))
    return " + ".join([start, w.index(store.where[0]), *point]), " & ".join(masks)


def _tails(w: Writer) -> list[str]:
    """After the last block of rows: this program's sums, to be added up by the second stage."""
    lines = list[str]()
    for i, store in enumerate(w.section.piece.stores):
        if store.sums and not _visits(w, store):
            pointer, mask = _pointer(w, store)
            lines.append(f"tl.store({pointer}, {_added(w, store, f'sum{i}')}{f', mask={mask}' if mask else ''})")
    return lines
