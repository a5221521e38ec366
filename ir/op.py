"""Ops: one decorated function is an op's name, meaning, typing, placement rule and cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

from . import cost
from .crossing import Crossing, Here, OneWay, Sent, bare, check_split, crossed, crossed_back
from .errors import PlacementError, TypeMismatch
from .signature import Axis, Binding, Operand, alias, bind, parse_signature, spread
from .sizes import plus, times
from .types import Dim, TensorType, checked

if TYPE_CHECKING:
    from .graph import Value

ROLES = ("map", "sum", "scan", "whole")
OPS: dict[str, OpDef] = {}
REQUIRED = inspect.Parameter.empty
Types = Sequence["TensorType | None"]
Gradient = str | Callable[[Mapping[str, "TensorType | None"], Mapping[str, Any]], str]


@dataclass(frozen=True)
class Conflict:
    """A dim whose placement an op cannot take."""

    operand: int
    position: int
    letter: str
    dim: Dim
    why: str


@dataclass(eq=False)
class OpDef:
    """All that is true of an op on any machine; `reference` is what it means."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    roles: Mapping[str, str]  # letter -> how the op treats a split of it
    reference: Callable[..., Any]  # eager torch on global tensors
    attrs: Mapping[str, Any]  # name -> default, or REQUIRED
    flops_text: str = "0"
    commutes: bool = False
    row: bool = False  # each row of the last dims is computed from that row alone
    linear: tuple[frozenset[str], ...] = ()  # sets of operands in which the op is jointly linear
    shapes: frozenset[str] = frozenset()  # operands that give their shape alone
    same: Mapping[str, tuple[str, str]] = field(
        default_factory=dict[str, "tuple[str, str]"]
    )  # n -> (b, cu): n is b unless cu is there
    type_rule: Callable[..., Any] | None = None  # only where the signature cannot say it
    rank_rule: Callable[..., list[Any]] | None = None  # collectives: what moves between ranks
    sample_rule: Callable[..., list[Any]] | None = None  # operands that random numbers cannot stand for
    vjp_rule: Gradient | None = None  # its cotangents, as text
    constant: str = ""  # why it has no gradient
    crossing: Crossing | None = None  # how it runs over a split of letters that it must see whole
    gradient_of: OpDef | None = None  # the op whose cotangents it computes
    begins: bool = False  # its result is under way, until an op that `ends` reads it
    ends: bool = False

    def __call__(self, *operands: Any, **named: Any) -> Any:
        """On tensors, compute; on values, record."""
        builder = next((x.builder for x in (*operands, *named.values()) if hasattr(x, "builder")), None)
        if builder is None:
            return self.reference(*operands, **named)
        attrs = {k: v for k, v in named.items() if k in self.attrs or not self.has_operand(k)}
        return unwrap(builder.emit(self, self.arrange(operands, {k: v for k, v in named.items() if k not in attrs}), attrs))

    def __repr__(self) -> str:
        return f"op {self.name}"

    def has_operand(self, name: str) -> bool:
        return any(o.name == name for o in self.inputs)

    def arrange(self, operands: Sequence[Value], named: Mapping[str, Value | None]) -> tuple[Value | None, ...]:
        """Positional and named operands in signature order, None for the absent."""
        if len(operands) > len(self.inputs):
            raise TypeMismatch(f"{self.name} takes {len(self.inputs)} operands, got {len(operands)}")
        by_name = dict(zip((o.name for o in self.inputs), operands, strict=False))
        if twice := by_name.keys() & named.keys():
            raise TypeMismatch(f"{self.name}: operand {min(twice)} is given twice")
        return tuple({**by_name, **named}.get(o.name) for o in self.inputs)

    def infers(self, rule: Callable[..., Any]) -> None:
        """Say the types of the results where letters cannot."""
        self.type_rule = rule

    def ranks(self, rule: Callable[..., list[Any]]) -> None:
        """Say what a collective moves, given the shards of one group of ranks."""
        self.rank_rule = rule

    def samples(self, rule: Callable[..., list[Any]]) -> None:
        """Say which random operands make sense."""
        self.sample_rule = rule

    def way(self, name: str, *, sent: Sent, orders: tuple[str, ...] = ("", "zigzag")) -> Callable[[Callable[..., Any]], None]:
        """Say how it runs over split tokens: a generator (see `crossing`), named in the attribute `by`."""
        assert self.crossing is not None

        def define(rule: Callable[..., Any]) -> None:
            self.crossing.ways[name] = OneWay(rule, sent, orders, (rule.__doc__ or "").strip())  # type: ignore[union-attr] # as above

        return define

    def way_back(self, name: str, *, sent: Sent) -> Callable[[Callable[..., Any]], None]:
        """Say a way's gradient, a generator too, where autograd of the way would keep every answer."""
        ways = self.crossing.ways if self.crossing else {}

        def define(rule: Callable[..., Any]) -> None:
            ways[name] = replace(ways[name], back=rule, back_sent=sent)

        return define

    def vjp(self, rule: Gradient) -> None:
        """Say the gradient, as equations over ops; a function of types (by name) and attributes, where these say how many."""
        self.vjp_rule = rule

    def no_gradient(self, why: str) -> None:
        """Say why there is none."""
        self.constant = why

    # -- typing ---------------------------------------------------------------------------

    def bind(self, types: Types, attrs: Mapping[str, Any]) -> Binding:
        """The letters' sizes and uses; an integer attribute that is a letter binds it."""
        self._check_present(types)
        known = {k: v for k, v in attrs.items() if k in self._letters and isinstance(v, int)}
        return bind(self.name, [alias(o, self._same(types)) for o in self.inputs], types, known)

    @cached_property
    def _letters(self) -> frozenset[str]:
        return frozenset(x for o in (*self.inputs, *self.outputs) for a in o.axes for x in a.letters)

    def _same(self, types: Types) -> dict[str, str]:
        absent = {o.name for o, t in zip(self.inputs, types, strict=True) if t is None}
        return {letter: other for letter, (other, unless) in self.same.items() if unless in absent}

    def _check_present(self, types: Types) -> None:
        if len(types) != len(self.inputs):
            raise TypeMismatch(f"{self.name} takes {len(self.inputs)} operands, got {len(types)}")
        for operand, type_ in zip(self.inputs, types, strict=True):
            if type_ is None and not operand.optional:
                raise TypeMismatch(f"{self.name}: operand {operand.name} is missing; it must be {operand}")
            if type_ and not (operand.dtype or type_.is_float or self.type_rule):
                raise TypeMismatch(f"{self.name}: {operand.name} is {type_}, its dtype must be a float")
            if type_ and operand.dtype not in ("", "acc") and type_.dtype != operand.dtype:
                raise TypeMismatch(f"{self.name}: {operand.name} is {type_}, its dtype must be {operand.dtype}")

    def conflicts(self, bound: Binding) -> list[Conflict]:
        """Every operand dim whose placement this op cannot take."""
        found = list[Conflict]()
        for letter, uses in bound.uses.items():
            role, first = self.role(letter), uses[0]
            for use in uses:
                dim = use.dim
                if role in ("scan", "whole") and dim.axes:
                    found.append(Conflict(use.operand, use.position, letter, dim, f"role {role} must see it whole"))
                elif role == "scan" and dim.order:
                    found.append(Conflict(use.operand, use.position, letter, dim, "role scan needs the natural order"))
                elif (dim.axes, dim.order) != (first.dim.axes, first.dim.order):
                    found.append(
                        Conflict(
                            use.operand, use.position, letter, dim, f"{self.inputs[first.operand].name} has it as {first.dim}"
                        )
                    )
        return found

    def role(self, letter: str) -> str:
        return "whole" if letter.isdigit() else self.roles["..." if letter.startswith("...") else letter]

    def infer(self, types: Types, attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
        """Types of the results; raises TypeMismatch or PlacementError."""
        if self.crossing and attrs.get("over") and not self.crossing.typed:
            return self._over(self.crossing, types, attrs)
        if self.type_rule:
            self._check_present(types)
            made = self.type_rule(*types, **attrs)
            results = made if isinstance(made, tuple) else (made,)
        else:
            results = self.result_types(*self.placed(types, attrs))
        return tuple(checked(t, self.name) for t in results)

    def _over(self, crossing: Crossing, types: Types, attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
        """As without the split that is crossed; then results are split as operands are, partial where they have no tokens."""
        bound, axis = self.bind(types, attrs), attrs["over"]
        check_split(self.name, crossing, bound, attrs)
        if summed := next((t for t in types if t is not None and axis in t.partial), None):
            raise PlacementError(f"{self.name}: {summed} is partial over {axis}, which it runs over; all_reduce it first")
        made = self.infer(bare(types, crossing, bound, axis), {**attrs, "over": ""})
        absent = {o.name for o, t in zip(self.inputs, types, strict=True) if t is None}
        outputs = [o for o in self.outputs if o.dtype not in absent] if len(made) < len(self.outputs) else self.outputs
        return tuple(self._split_again(t, o, crossing, bound, axis) for t, o in zip(made, outputs, strict=True))

    def _split_again(self, made: TensorType, out: Operand, crossing: Crossing, bound: Binding, axis: str) -> TensorType:
        for i, a in enumerate(spread(out.axes, bound.rest)):
            uses = bound.uses.get(a.letters[0], ()) if crossing.crosses(a.letters[0]) else ()
            if dim := next((u.dim for u in uses if axis in u.dim.axes), None):
                return made.with_dim(i, replace(made.dims[i], axes=(*made.dims[i].axes, axis), order=dim.order))
        return made if crossing.summed else replace(made, partial=made.partial | {axis})

    def placed(self, types: Types, attrs: Mapping[str, Any]) -> tuple[Binding, Types, frozenset[str]]:
        """The letters and the axes that results are partial over; a PlacementError where an operand cannot live as it does."""
        bound = self.bind(types, attrs)
        if bad := self.conflicts(bound):
            c = bad[0]
            raise PlacementError(f"{self.name}: {self.inputs[c.operand].name}.{c.letter} is {c.dim}; {c.why}")
        return bound, types, self._partial(bound, types)

    def result_types(self, bound: Binding, types: Types, partial: frozenset[str]) -> tuple[TensorType, ...]:
        """What the signature says of the results, placements carried over letter by letter."""
        dtypes = {o.name: t.dtype for o, t in zip(self.inputs, types, strict=True) if t is not None}
        outputs = [alias(o, self._same(types)) for o in self.outputs]
        return tuple(
            TensorType(_dtype(out, dtypes), tuple(self._dim(a, bound) for a in spread(out.axes, bound.rest)), partial)
            for out in outputs
        )

    def _dim(self, axis: Axis, bound: Binding) -> Dim:
        dims = [bound.dim(x) for x in axis.letters]
        size = plus(times(*(d.size for d in dims)), axis.offset) if axis.offset else times(*(d.size for d in dims))
        if inner := next((d for d in dims[1:] if d.axes or d.order), None):
            raise PlacementError(f"{self.name}: {inner} is split, but it is not the outermost of ({' '.join(axis.letters)})")
        return Dim(size, dims[0].axes, dims[0].order)

    def _partial(self, bound: Binding, types: Types) -> frozenset[str]:
        """Axes the results are partial over: operands that are, and summed letters that are split."""
        summed = [
            {*t.partial} if t and o.name not in self.shapes else set[str]() for o, t in zip(self.inputs, types, strict=True)
        ]
        split = [set[str]() for _ in types]
        for letter, uses in bound.uses.items():
            if self.role(letter) == "sum":
                for use in uses:
                    split[use.operand].update(use.dim.axes)
        axes = set[str]().union(*summed, *split)
        for axis in sorted(axes):
            self._check_linear(axis, types, summed, split)
        return frozenset(axes)

    def _check_linear(self, axis: str, types: Types, summed: list[set[str]], split: list[set[str]]) -> None:
        """A sum over ranks may be put off only through operands in which the op is linear."""
        present = {o.name: i for i, (o, t) in enumerate(zip(self.inputs, types, strict=True)) if t is not None}
        for group in self.linear:
            inside = [i for name, i in present.items() if name in group]
            outside = [i for name, i in present.items() if name not in group]
            covered = inside and all(axis in summed[i] or axis in split[i] for i in inside)
            if covered and not any(axis in summed[i] for i in outside):
                return
        culprit = next((n for n, i in present.items() if axis in summed[i]), None)
        if culprit:
            raise PlacementError(
                f"{self.name}: {culprit} is partial over {axis}, in which the op is not linear; all_reduce it first"
            )
        raise PlacementError(
            f"{self.name}: a summed dim is split over {axis}, but another operand would be added once per rank"
        )

    # -- cost -----------------------------------------------------------------------------

    @cached_property
    def _flops(self) -> cost.Expression:
        return cost.parse(self.flops_text, self.name)

    def flops(self, types: Types, attrs: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
        """Floating-point operations, symbols bound by `sizes`."""
        return cost.evaluate(self._flops, self.bind(types, attrs), attrs, sizes)


def op(
    signature: str,
    *,
    flops: str = "0",
    commutes: bool = False,
    row: bool = False,
    linear: str = "",
    shape: str = "",
    same: str = "",
    over: str = "",
    summed: bool = False,
    **roles: str,
) -> Callable[[Callable[..., Any]], OpDef]:
    """Define an op: `@op("x[... d], w[d] -> y[... d]", map="...", whole="d", linear="x, w")`.

    `over` are letters a split of which it can be run across, by one of its ways: it has attributes over, by and order then.
    """
    inputs, outputs = parse_signature(signature)
    by_letter = {letter: role for role in ROLES for letter in roles.pop(role, "").split()}
    if roles:
        raise ValueError(f"unknown roles {sorted(roles)}; a role is one of {ROLES}")
    groups = tuple(frozenset(g.split()) for g in linear.split(",") if g.strip())
    same_as = [rule.split() for rule in same.split(",") if rule]  # "n b cu": n is b unless cu
    equal = {n: (b, unless) for n, b, unless in same_as}

    def define(fn: Callable[..., Any]) -> OpDef:
        letters = {x for o in inputs for a in o.axes for x in a.letters if not x.isdigit()}
        if missing := letters ^ by_letter.keys():
            raise ValueError(f"{fn.__name__}: give each dim one role; differing: {sorted(missing)}")
        reference = _crossing_attrs(fn) if over else fn
        params = inspect.signature(reference).parameters.values()
        attrs = {p.name: p.default for p in params if p.kind is p.KEYWORD_ONLY}
        claims = (flops, commutes, row, groups, frozenset(shape.split()), equal)
        made = OpDef(fn.__name__, inputs, outputs, by_letter, reference, attrs, *claims)
        made.crossing = Crossing(frozenset(over.split()), summed) if over else None
        made.__doc__ = fn.__doc__
        OPS[made.name] = made
        return made

    return define


def across(op: OpDef, places: Sequence[Here], operands: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Every rank's results of an op that runs over their axis, in one process; a gradient's op goes by its forward's way."""
    crossing, of = op.crossing, op.gradient_of
    assert crossing is not None
    way = crossing.ways[places[0].by]
    if of is None:
        return crossed(way, places, operands)
    count = len(of.inputs)
    starts = [seeds(of, xs[count:], here.rank) for here, xs in zip(places, operands, strict=True)]
    return list(crossed_back(way, places, [xs[:count] for xs in operands], starts))


def seeds(of: OpDef, cotangents: Sequence[Any], rank: int) -> list[Any]:
    """A rank's cotangents of the results: of one that is whole, the first rank's alone."""
    assert of.crossing is not None
    whole = [of.crossing.summed and not any(of.crossing.crosses(x) for a in o.axes for x in a.letters) for o in of.outputs]
    return [None if alone and rank else d for d, alone in zip(cotangents, whole, strict=True)]


CROSSING_ATTRS = ("over", "by", "order")


def _crossing_attrs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The reference with attributes that say how it runs over a split; what it means does not depend on them."""

    @wraps(fn)
    def reference(*operands: Any, over: str = "", by: str = "", order: str = "", **named: Any) -> Any:
        return fn(*operands, **named)

    own = inspect.signature(fn)
    kinds = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default="", annotation="str") for n in CROSSING_ATTRS]
    reference.__signature__ = own.replace(parameters=[*own.parameters.values(), *kinds])  # type: ignore[attr-defined] # read by inspect
    return reference


def accumulator(dtype: str) -> str:
    """The dtype that sums of this dtype are kept in."""
    return "f64" if dtype == "f64" else "f32"


def _dtype(out: Operand, operands: Mapping[str, str]) -> str:
    first = next(iter(operands.values()))
    return accumulator(first) if out.dtype == "acc" else operands.get(out.dtype, out.dtype) or first


def unwrap(values: tuple[Value, ...]) -> Value | tuple[Value, ...]:
    return values[0] if len(values) == 1 else values
