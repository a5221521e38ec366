"""Text form, in: typed graphs out of text, with every mistake pointed at."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import sizes
from .errors import ParseError, PlaitError, TypeMismatch
from .graph import ROLES, Builder, Graph, Value, check_name
from .init import Init, checked
from .op import OPS, OpDef
from .orders import parse_order
from .sizes import Size
from .statement import Source, Stmt, Var, literal, names, statement, syntax
from .types import DTYPES, Dim, TensorType

_LOC = re.compile(r"#.* from ([\w.]+)\s*$")
MAX_CALLS = 32  # graphs that call each other in a chain


def parse(text: str, file: str = "") -> Graph:
    """The first graph of the text, with the graphs it calls. Raises ParseError, with a caret."""
    source = Source(text, file)
    module = _Module(source, {})
    for s in syntax(source):
        if not isinstance(s, ast.FunctionDef):
            source.fail("a graph starts with `def name(...):`", s)
        if s.name in module.defs:
            source.fail(f"graph {s.name} is defined twice", s)
        module.defs[s.name] = s
    if not module.defs:
        source.fail("there is no graph here; one starts with `def name(...):`", line=1)
    return module.graph(next(iter(module.defs)))


def parse_type(text: str) -> TensorType:
    """`bf16[b, s@cp, 64]+tp` as a type."""
    source = Source(text)
    body = syntax(source)
    if len(body) != 1 or not isinstance(body[0], ast.Expr):
        source.fail("expected a type such as `bf16[b, s@cp, 1024]`", line=1)
    return _type(source, body[0].value)


@dataclass
class _Module:
    source: Source
    defs: dict[str, ast.FunctionDef]
    done: dict[str, Graph] = field(default_factory=dict[str, Graph])
    active: list[str] = field(default_factory=list[str])

    def graph(self, name: str) -> Graph:
        if name not in self.done:
            self.active.append(name)
            self.done[name] = self._read(self.defs[name])
            self.active.pop()
        return self.done[name]

    def _read(self, fn: ast.FunctionDef) -> Graph:
        b = Builder(_name(self.source, fn.name, "graph name", fn), self._role(fn))
        env = self._inputs(fn, b)
        for s in fn.body[:-1]:
            self._equation(statement(self.source, s), b, env)
        last = fn.body[-1]
        if not isinstance(last, ast.Return) or last.value is None:
            self.source.fail("a graph ends with `return`", last)
        return b.finish([self._value(n, env, last) for n in names(self.source, last.value)])

    def _role(self, fn: ast.FunctionDef) -> str:
        if not fn.decorator_list:
            return "graph"
        mark = fn.decorator_list[0]
        if len(fn.decorator_list) > 1 or not isinstance(mark, ast.Name) or mark.id not in ROLES:
            self.source.fail("a graph may be marked @layer or @kernel, nothing else", mark)
        return mark.id

    def _inputs(self, fn: ast.FunctionDef, b: Builder) -> dict[str, Value]:
        a = fn.args
        if a.vararg or a.kwarg or a.defaults or a.posonlyargs:
            self.source.fail("an input is `name: type`, a parameter after `*` is `name: type = recipe(...)`", fn)
        env = dict[str, Value]()
        for arg in (*a.args, *a.kwonlyargs):
            if arg.arg in env:
                self.source.fail(f"{arg.arg} is defined twice", arg)
            _name(self.source, arg.arg, "name", arg)
            make = partial(self._input if arg in a.args else self._param, arg, a, b)
            env[arg.arg] = self._guard(make, arg)
        return env

    def _input(self, arg: ast.arg, a: ast.arguments, b: Builder) -> Value:
        return b.input(arg.arg, self._input_type(arg))

    def _param(self, arg: ast.arg, a: ast.arguments, b: Builder) -> Value:
        recipe = a.kw_defaults[a.kwonlyargs.index(arg)]
        init = Init("normal", (0.02,)) if recipe is None else self._init(recipe)
        return b.param(arg.arg, self._input_type(arg), init)

    def _init(self, node: ast.expr) -> Init:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
            self.source.fail("a parameter's default is its init recipe, `normal(0.02)`", node)
        args = [literal(self.source, x) for x in node.args]
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in args):
            self.source.fail("an init recipe takes numbers", node)
        return self._guard(lambda: checked(Init(node.func.id, tuple(float(x) for x in args))), node)  # type: ignore[reportAttributeAccessIssue] # narrowed above

    def _input_type(self, arg: ast.arg) -> TensorType:
        if arg.annotation is None:
            self.source.fail(f"{arg.arg} needs a type such as `bf16[b, s@cp, 1024]`", arg)
        return _type(self.source, arg.annotation)

    def _value(self, name: str, env: dict[str, Value], node: ast.AST) -> Value:
        if name not in env:
            self.source.fail(f"{name} is not defined above this line", node)
        return env[name]

    def _equation(self, s: Stmt, b: Builder, env: dict[str, Value]) -> None:
        for i, target in enumerate(s.targets):
            _name(self.source, target, "name", s.node)
            if target in env or target in s.targets[:i]:
                self.source.fail(f"{target} is defined twice", s.node)
        env.update(zip(s.targets, self._guard(lambda: self._emit(s, b, env), s.node), strict=True))

    def _emit(self, s: Stmt, b: Builder, env: dict[str, Value]) -> tuple[Value, ...]:
        args = [self._value(n, env, s.node) for n in s.args]
        named = {k: self._value(str(n), env, s.node) for k, n in s.named.items()}
        loc = self._loc(s.node)
        if s.callee in self.defs:
            return self._call(s, b, args, loc)
        if s.callee not in OPS:
            self.source.fail(f"no op or graph called {s.callee}", s.node)
        op: OpDef = OPS[s.callee]
        if stray := [k for k in named if not op.has_operand(k)]:
            self.source.fail(f"{op.name} has no operand {stray[0]}", s.node)
        return b.emit(op, op.arrange(args, named), s.attrs, s.targets, loc)

    def _call(self, s: Stmt, b: Builder, args: Sequence[Value], loc: str) -> tuple[Value, ...]:
        if s.callee in self.active:
            self.source.fail(f"graph {s.callee} calls itself", s.node)
        if len(self.active) >= MAX_CALLS:
            self.source.fail(f"graphs call each other more than {MAX_CALLS} deep", s.node)
        callee = self.graph(s.callee)
        wanted = {"params"} if callee.role == "layer" else set[str]()
        if s.named or s.attrs.keys() != wanted or not all(isinstance(v, str) for v in s.attrs.values()):
            self.source.fail(f"{s.callee} is called with operands" + (" and params='prefix'" if wanted else " alone"), s.node)
        for given, value in zip(args, callee.inputs, strict=False):
            if given.type != value.type:
                self.source.fail(f"{s.callee}: {value.name} is {given.type}, must be {value.type}", s.node)
        return b.emit(callee, args, s.attrs, s.targets, loc)

    def _loc(self, node: ast.AST) -> str:
        line = getattr(node, "end_lineno", 0) or 0
        found = _LOC.search(self.source.lines[line - 1]) if line else None
        return found[1] if found else ""

    def _guard(self, make: Any, node: ast.AST) -> Any:
        try:
            return make()
        except ParseError as error:
            if ", line " in str(error):
                raise
            self.source.fail(str(error), node)
        except PlaitError as error:
            self.source.fail(str(error), node)
        except (ValueError, OverflowError) as error:
            self.source.fail(f"sizes do not fit: {error}", node)


def _name(source: Source, name: str, what: str, node: ast.AST) -> str:
    """A plain identifier, or a ParseError that points at it."""
    try:
        return check_name(name, what)
    except ParseError as error:
        source.fail(str(error), node)


def _type(source: Source, node: ast.expr) -> TensorType:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=ast.Name(id=axis)):
            base = _type(source, left)
            if axis in base.partial:
                source.fail(f"the type is partial over {axis} twice", node)
            return TensorType(base.dtype, base.dims, base.partial | {_name(source, axis, "mesh axis", node)})
        case ast.Subscript(value=ast.Name(id=dtype), slice=index) if dtype in DTYPES:
            elements = index.elts if isinstance(index, ast.Tuple) else [index]
            return TensorType(dtype, tuple(_dim(source, e) for e in elements))
        case ast.Subscript(value=ast.Name(id=dtype)):
            source.fail(f"no dtype called {dtype}; there are {', '.join(DTYPES)}", node)
        case _:
            source.fail("expected a type such as `bf16[b, s@cp, 1024]`", node)


def _dim(source: Source, node: ast.expr) -> Dim:
    match node:
        case ast.Slice(lower=ast.expr() as lower, upper=ast.expr() as order, step=None):
            inner = _dim(source, lower)
            return Dim(inner.size, inner.axes, _order(source, order))
        case ast.BinOp(left=left, op=ast.MatMult(), right=ast.Name(id=axis)):
            inner = _dim(source, left)
            return Dim(inner.size, (*inner.axes, _name(source, axis, "mesh axis", node)))
        case _:
            return Dim(_size(source, node))


def _order(source: Source, node: ast.expr) -> str:
    text = "".join(ast.unparse(node).split())
    try:
        parse_order(text)
    except TypeMismatch as error:
        known = "zigzag(4), zigzag(4,packed) or sections(4,8,8,2)"
        source.fail(f"an order is {known}; the natural one is not written: {str(error)[:120]}", node)
    return text


def _size(source: Source, node: ast.expr) -> Size:
    match node:
        case ast.Constant(value=int(size)) if not isinstance(size, bool) and sizes.possible(size):
            return size
        case ast.Name(id=symbol):
            return _name(source, symbol, "size", node)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _fits(source, node, sizes.times, _size(source, left), _size(source, right))
        case ast.BinOp(left=left, op=ast.Add(), right=ast.Constant(value=int(offset))):
            return _fits(source, node, sizes.plus, _size(source, left), offset)
        case ast.BinOp(left=left, op=ast.Sub(), right=ast.Constant(value=int(offset))):
            return _fits(source, node, sizes.plus, _size(source, left), -offset)
        case _:
            source.fail("not a dim; expected `64`, `s`, `4*b*s`, `n+1`, `s@cp` or `s@cp:zigzag(2)`", node)


def _fits(source: Source, node: ast.expr, join: Callable[..., Size], *parts: Any) -> Size:
    """The joined size, unless it is none: negative, a product with a sum, or past what a tensor can have."""
    try:
        made = join(*parts)
    except TypeMismatch as error:
        source.fail(str(error), node)
    if not sizes.possible(made):
        source.fail("a size is at least 0 and under 2**62", node)
    return made


def parse_statements(text: str) -> tuple[Stmt, ...]:
    """Untyped statements, as rewrite rules have them; a keyword's name may be an attribute variable."""
    lines = [line.strip() for line in text.strip().splitlines()]
    source = Source("\n".join(lines))
    return tuple(_with_variables(source, statement(source, s)) for s in syntax(source))


def _with_variables(source: Source, s: Stmt) -> Stmt:
    op = OPS.get(s.callee)
    named = {k: v if op is not None and op.has_operand(k) else Var(str(v)) for k, v in s.named.items()}
    operands: dict[str, str | Var] = {k: v for k, v in named.items() if isinstance(v, str)}
    attrs = {**s.attrs, **{k: v for k, v in named.items() if isinstance(v, Var)}}
    return Stmt(s.targets, s.callee, s.args, operands, attrs, s.node)
