"""Gradients of ops: the text below an op, emitted as equations over the cotangents of its results.

    rms_norm.vjp('''
        g = widen(d_y)
        if w:
            ...
        d_x = scale_rows(sub(s, scale_rows(n, row_mean(mul(s, n)))), r)
    ''')

Names are operands, results, `d_<result>` and what stands above; `d_<operand>` is what is asked for. An `if` decides by the
presence of an operand or cotangent, or by an attribute. A keyword's value may name an attribute, or a letter whose size is
a number; `{name}` inside text is one too. Only equations that a wanted cotangent needs are emitted.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import PlaitError, TypeMismatch
from .graph import Builder, Node, Value
from .op import OPS, OpDef
from .statement import Source, Stmt, statement, syntax
from .types import TensorType

IDENTITY = "="  # the callee of `d_x = d_y`
LIFTED = "@"  # starts the name of a call that stood inside another


@dataclass(frozen=True)
class Branch:
    """An `if` of the text; its test is decided once a node is known."""

    test: ast.expr
    body: tuple[Line, ...]
    otherwise: tuple[Line, ...]


Line = Stmt | Branch


@dataclass(frozen=True)
class Scope:
    """What the text of one node's gradient can name: values by name (None where absent), attributes, letters."""

    op: OpDef
    inputs: tuple[TensorType | None, ...]
    types: Mapping[str, TensorType | None]
    attrs: Mapping[str, Any]

    def number(self, name: str) -> Any:
        """An attribute, or the size of a letter."""
        if name in self.attrs:
            return self.attrs[name]
        size = self.op.bind(self.inputs, self.attrs).size
        if name not in size:
            raise ValueError(f"{self.op.name}.vjp: no attribute or letter called {name}")
        return size[name]

    def holds(self, test: ast.expr) -> bool:
        match test:
            case ast.Name(id=name) if name in self.types:
                return self.types[name] is not None
            case ast.Name(id=name) if name in self.attrs:
                return bool(self.attrs[name])
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()], comparators=[ast.Constant(value=value)]):
                return self.number(name) == value
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Gt()], comparators=[ast.Constant(value=int(value))]):
                return self.number(name) > value
            case _:
                raise ValueError(f"{self.op.name}.vjp: no test: `if {ast.unparse(test)}`")


@dataclass(frozen=True)
class Plan:
    """The equations to emit, in order; what they make of what is wanted; and what they read."""

    lines: tuple[Stmt, ...]
    makes: frozenset[str]
    reads: frozenset[str]
    zeros: frozenset[str]  # absent cotangents where a value must stand


def pullback(
    b: Builder,
    node: Node,
    inputs: Sequence[Value | None],
    outputs: Sequence[Value | None],
    cotangents: Sequence[Value | None],
    wanted: Sequence[bool],
) -> list[Value | None]:
    """The cotangent of each operand of an op's node, emitted into `b`; None where it is not wanted or nothing flows."""
    op, results = _op(node), _results(node)
    scope = _scope(node, [v.type if v is not None else None for v in cotangents])
    plan = _plan(node, scope, wanted)
    names = [*(o.name for o in op.inputs), *results, *map(_d, results)]
    env = dict(zip(names, [*inputs, *outputs, *cotangents], strict=True))
    assert all(env[n] is not None for n in plan.reads), f"the gradient of {op.name} reads {', '.join(sorted(plan.reads))}"
    partial = {axis for v in cotangents if v is not None for axis in v.type.partial}
    for name in sorted(plan.zeros):  # zeros are a sum over ranks where the others are
        like = env[name.removeprefix("d_")]
        env[name] = b.emit(OPS["zeros_like"], [like], {"partial": tuple(sorted(partial))}, [name], node.loc)[0]
    for line in plan.lines:
        env.update(zip(line.targets, _emit(b, line, env, scope, node.loc), strict=True))
    return [
        _fitted(b, env[_d(o.name)], v, node) if v is not None and _d(o.name) in plan.makes else None
        for o, v in zip(op.inputs, node.inputs, strict=True)
    ]


def reads(node: Node, cotangents_present: Sequence[bool], wanted: Sequence[bool]) -> tuple[frozenset[int], frozenset[int]]:
    """Which operands and which results (by index) the gradient reads, so that only these need be kept."""
    given = [v.type if there else None for v, there in zip(node.outputs, cotangents_present, strict=True)]
    plan, results = _plan(node, _scope(node, given), wanted), _results(node)
    operands = frozenset(i for i, o in enumerate(_op(node).inputs) if o.name in plan.reads)
    return operands, frozenset(i for i, name in enumerate(results) if name in plan.reads)


def _op(node: Node) -> OpDef:
    assert isinstance(node.op, OpDef), "the gradient of a call is its callee's"
    return node.op


def _d(name: str) -> str:
    return f"d_{name}"


def _results(node: Node) -> list[str]:
    """The names of the results; where an attribute says how many there are, they are numbered."""
    named = [o.name for o in _op(node).outputs]
    return named if len(named) == len(node.outputs) else [f"{named[0]}{i}" for i in range(len(node.outputs))]


def _scope(node: Node, cotangents: Sequence[TensorType | None]) -> Scope:
    op, results = _op(node), _results(node)
    inputs = tuple(v.type if v is not None else None for v in node.inputs)
    types = dict(zip([o.name for o in op.inputs], inputs, strict=True))
    types |= dict(zip(results, [v.type for v in node.outputs], strict=True))
    return Scope(op, inputs, types | dict(zip(map(_d, results), cotangents, strict=True)), node.attrs)


# -- which equations --------------------------------------------------------------------------


def _plan(node: Node, scope: Scope, wanted: Sequence[bool]) -> Plan:
    """The equations between the cotangents that are there and those that are wanted."""
    asked = {_d(o.name) for o, t, w in zip(scope.op.inputs, scope.inputs, wanted, strict=True) if w and t and t.is_float}
    cotangents = {_d(name) for name in _results(node)}
    given = {d for d in cotangents if scope.types[d] is not None}
    if not asked or not given:
        return Plan((), frozenset(), frozenset(), frozenset())
    lines = tuple(_decided(parsed(_text(node, scope)), scope))
    _check(lines, scope)
    makes = asked & _reached(lines, given)
    kept, needed = _needed(lines, makes)
    absent = {n for n, t in scope.types.items() if t is None}
    zeros = absent & {n for line in kept for n in _required(line)}
    if bad := zeros - cotangents:
        raise ValueError(f"{scope.op.name}.vjp: operand {min(bad)} is absent where a value must stand")
    values = scope.types.keys() - cotangents - absent
    return Plan(kept, frozenset(makes), frozenset(needed & values | {z.removeprefix("d_") for z in zeros}), frozenset(zeros))


def _needed(lines: Sequence[Stmt], makes: set[str]) -> tuple[tuple[Stmt, ...], set[str]]:
    """The equations that these names need, and all names that they read."""
    needed, kept = set(makes), list[Stmt]()
    for line in reversed(lines):
        if needed & {*line.targets}:
            kept.append(line)
            needed |= {*_operands(line)}
    return tuple(reversed(kept)), needed


def _text(node: Node, scope: Scope) -> str:
    rule, op = scope.op.vjp_rule, scope.op
    if op.constant or rule is None:
        at = f" (at {node.loc})" if node.loc else ""
        raise PlaitError(f"{op.name} has no gradient: {op.constant or 'none was written for it'}{at}")
    return rule if isinstance(rule, str) else rule(scope.types, scope.attrs)


def _decided(lines: Iterable[Line], scope: Scope) -> Iterable[Stmt]:
    """The equations in order, of each `if` the side that holds."""
    for line in lines:
        if isinstance(line, Stmt):
            yield line
        else:
            yield from _decided(line.body if scope.holds(line.test) else line.otherwise, scope)


def _check(lines: Sequence[Stmt], scope: Scope) -> None:
    """Refuse an equation that names what there is not, or defines a name again."""
    known = set(scope.types)
    for line in lines:
        if line.callee != IDENTITY and line.callee not in OPS:
            raise ValueError(f"{scope.op.name}.vjp: no op called {line.callee}")
        if unknown := {*_operands(line)} - known:
            raise ValueError(f"{scope.op.name}.vjp: {min(unknown)} is not defined before it is used")
        if twice := {*line.targets} & known:
            raise ValueError(f"{scope.op.name}.vjp: {min(twice)} is defined twice")
        known |= {*line.targets}


def _reached(lines: Sequence[Stmt], given: set[str]) -> set[str]:
    """What depends on the cotangents that are there; all else is zero."""
    found = set(given)
    for line in lines:
        if found & {*_operands(line)}:
            found |= {*line.targets}
    return found


def _operands(line: Stmt) -> tuple[str, ...]:
    """The values an equation reads."""
    if line.callee == IDENTITY:
        return line.args
    op = OPS[line.callee]
    return (*line.args, *(str(v) for k, v in line.named.items() if op.has_operand(k)))


def _required(line: Stmt) -> list[str]:
    """The values it cannot do without."""
    if line.callee == IDENTITY:
        return [*line.args]
    op = OPS[line.callee]
    optional = {o.name for o in op.inputs if o.optional}
    placed = [n for o, n in zip(op.inputs, line.args, strict=False) if not o.optional]
    return placed + [str(v) for k, v in line.named.items() if op.has_operand(k) and k not in optional]


# -- emitting ---------------------------------------------------------------------------------


def _emit(b: Builder, line: Stmt, env: Mapping[str, Value | None], scope: Scope, loc: str) -> Sequence[Value | None]:
    if line.callee == IDENTITY:
        return [env[line.args[0]]]
    op = OPS[line.callee]
    named = {k: env[str(v)] for k, v in line.named.items() if op.has_operand(k)}
    operands = op.arrange([env[n] for n in line.args], named)  # type: ignore[arg-type] # an absent operand is None
    attrs = {k: _filled(v, scope) for k, v in line.attrs.items()}
    attrs |= {k: scope.number(str(v)) for k, v in line.named.items() if k not in named}
    names = () if line.targets[0].startswith(LIFTED) else line.targets
    return b.emit(op, operands, attrs, names, loc)


def _filled(value: Any, scope: Scope) -> Any:
    """Text with `{name}` replaced by the number it names."""
    return re.sub(r"\{(\w+)\}", lambda m: str(scope.number(m[1])), value) if isinstance(value, str) else value


def _fitted(b: Builder, made: Value | None, operand: Value, node: Node) -> Value:
    """The cotangent in its operand's dtype."""
    assert made is not None and made.type.shape == operand.type.shape, f"{node.op.name}.vjp: {made} for {operand}"
    want = operand.type.dtype
    if made.type.dtype != want:
        made = b.emit(OPS["cast"], [made], {"dtype": want}, [made.name], node.loc)[0]
    if made.type.dtype != want:
        raise TypeMismatch(
            f"{node.op.name}: the cotangent of {operand.name} is {made.type}, must be {want}; do not mix f64 with other floats"
        )
    return made


# -- reading the text -------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def parsed(text: str) -> tuple[Line, ...]:
    """The text's equations and branches; a call inside a call becomes an equation of its own."""
    source = Source(textwrap.dedent(text).strip("\n"))
    return tuple(_lines(source, syntax(source)))


def _lines(source: Source, body: Sequence[ast.stmt]) -> list[Line]:
    found, lifter = list[Line](), _Lifter(source)
    for s in body:
        match s:
            case ast.If(test=test, body=inner, orelse=otherwise):
                found.append(Branch(test, tuple(_lines(source, inner)), tuple(_lines(source, otherwise))))
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Name(id=name)):
                found.append(Stmt((target,), IDENTITY, (name,), {}, {}, s))
            case ast.Assign(value=ast.Call() as call):
                found += [*lifter.inner(call), statement(source, s)]
            case _:
                source.fail("expected `y = op(x, attr=1)`, `y = x` or `if name:`", s)
    return found


@dataclass(frozen=True)
class _Lifter:
    """Takes calls out of calls."""

    source: Source

    def inner(self, call: ast.Call) -> list[Stmt]:
        """The equations of the calls among the arguments, which names of theirs replace."""
        found = list[Stmt]()
        call.args = [self.named(a, found) for a in call.args]
        for keyword in call.keywords:
            keyword.value = self.named(keyword.value, found)
        return found

    def named(self, argument: ast.expr, found: list[Stmt]) -> ast.expr:
        if not isinstance(argument, ast.Call):
            return argument
        found += self.inner(argument)
        name = f"{LIFTED}{argument.lineno}_{argument.col_offset}"
        target = ast.copy_location(ast.Name(id=name), argument)
        found.append(statement(self.source, ast.copy_location(ast.Assign(targets=[target], value=argument), argument)))
        return target
