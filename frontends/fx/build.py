"""An exported module as a graph: every aten call an op of the IR where one means the same, else the op `aten`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir import OPS, Builder, Graph, Init, TensorType, TypeMismatch, Value, ops
from ...ir.ops.aten import NAMES, OPERANDS
from ...ir.rearrange import Rearrangement, text
from ...ir.sizes import Size
from .export import Exported, TraceError
from .handlers import HANDLERS, argument
from .known import Known
from .pairs import COMPLEX, is_complex, pair, touches_complex
from .recognize import Table, recognized
from .views import Symbols

Tensor = torch.Tensor
PLACED = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy")  # says where, not what


@dataclass(frozen=True)
class Built:
    """A graph, and how its parameters and inputs are called in the module."""

    graph: Graph
    weights: Mapping[str, str]  # a parameter of the graph -> its name in the module
    inputs: tuple[int, ...]  # which leaves of a call are the graph's inputs
    outputs: tuple[int | None, ...]  # for every leaf of a result, which result of the graph it is; None is None


class Tracing:
    """Grows a graph along a trace; handlers are given it to emit what a call means."""

    def __init__(self, exported: Exported) -> None:
        self.exported, self.symbols, self.builder = exported, Symbols(), Builder(_plain(type(exported.module).__name__))
        self.env = dict[fx.Node, Value | tuple[Value, ...]]()
        self.weights, self.known = dict[str, str](), Known(exported)
        self.tables = dict[fx.Node, Table]()
        self.inputs = list[fx.Node]()
        self.places: Value | None = None

    # -- what handlers use ----------------------------------------------------------------

    def value(self, node: Any) -> Value:
        """The value of a traced tensor; known ones are made when they are first asked for."""
        if node not in self.env:
            self._make(node)
        made = self.env[node]
        if not isinstance(made, Value):
            raise TypeMismatch(f"{node} has {len(made)} results; one was expected")
        return made

    def shape(self, node: Any) -> tuple[Size, ...]:
        return tuple(self.symbols.size(n) for n in node.meta["val"].shape)

    def emit(self, name: str, *operands: Value | None, **attrs: Any) -> Value:
        """One op with one result."""
        return self.all(name, *operands, **attrs)[0]

    def all(self, name: str, *operands: Value | None, **attrs: Any) -> tuple[Value, ...]:
        op = OPS[name]
        padded = [*operands, *[None] * (len(op.inputs) - len(operands))]
        return self.builder.emit(op, padded, attrs)

    def view(self, x: Value, made: Rearrangement | None) -> Value | None:
        """A rearrangement of x, or None where no pattern says it."""
        if made is not None and made.nothing:
            return x
        pattern = _pattern(made) if made is not None else None
        return None if pattern is None else self.emit("reshape", x, pattern=pattern)

    def as_dtype(self, x: Value, dtype: str) -> Value | None:
        """The value as another dtype, exactly as torch would; None where the IR has no op for it."""
        if x.type.dtype == dtype:
            return x
        if not (x.type.is_float and dtype in NAMES.values() and TensorType(dtype, ()).is_float) or x.type.dtype == "f64":
            return None
        return self.emit("widen", x) if dtype == "f32" else self.emit("cast", x, dtype=dtype)

    def positions(self) -> Value:
        """0, 1, 2, ... for every row of the first input."""
        if self.places is None:
            first = self.value(self.inputs[0])
            if first.type.dtype == "i64" and len(first.type.dims) == 2:
                self.places = self.emit("positions", first)
            else:
                row = self.emit("aten", first, target="aten.arange.default", args="x0[1]")
                self.places = self.emit("aten", row, first, target="aten.expand.default", args="x0, [x1[0], x1[1]]")
        return self.places

    # -- the walk --------------------------------------------------------------------------

    def run(self) -> Built:
        self._inputs()
        for node in self.exported.program.graph.nodes:
            tensors = isinstance(node.meta.get("val"), Tensor | tuple | list)
            if node.op == "call_function" and node not in self.known.nodes and tensors:
                self._make(node)
            elif node.op not in ("placeholder", "output", "call_function"):
                raise TraceError(f"{node.target} is {node.op}; only calls of torch's ops can stand in a graph{_line(node)}")
        return self._finish()

    def _inputs(self) -> None:
        signature = self.exported.program.graph_signature
        held = signature.inputs_to_parameters | signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
        nodes = [n for n in self.exported.program.graph.nodes if n.op == "placeholder"]
        self.inputs = [n for n in nodes if n.name not in held and isinstance(n.meta.get("val"), Tensor)]
        if odd := [name for n, name in zip(self.inputs, self.exported.names, strict=True) if is_complex(n)]:
            raise TraceError(f"{odd[0]} holds complex numbers; give torch.view_as_real of it, and view_as_complex it inside")
        fresh = _Fresh()
        for node, name in zip(self.inputs, self.exported.names, strict=True):
            self.env[node] = self.builder.input(fresh(_plain(name)), self._type(node))
        for node in nodes:
            if node.name in held:
                path = held[node.name].removeprefix("module.")
                name = fresh(_plain(path))
                self.weights[name] = path
                self.env[node] = self.builder.param(name, self._type(node), Init("normal", (0.02,)))
        shaped = next((n.meta["val"].shape for n in self.inputs if n.meta["val"].dim() > 1), None)
        if shaped is not None:
            self.tables = recognized(self.known, shaped[0], shaped[1])

    def _type(self, node: fx.Node) -> TensorType:
        return self.symbols.type(node.meta["val"], node.name)

    def _make(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            raise TraceError(f"{node.name} is no tensor that a graph can have")
        outer, self.builder.loc = self.builder.loc, _path(node) or self.builder.name
        try:
            self._translate(node)
        finally:
            self.builder.loc = outer

    def _translate(self, node: fx.Node) -> None:
        """As a table, as ops of the IR, or as what it is."""
        if node in self.tables:
            self.env[node] = self._table(self.tables[node])
            return
        before = len(self.builder.nodes)
        try:
            made = self._handled(node)
            if made is not None and self._fits(node, made):
                self.env[node] = made
                return
        except TypeMismatch:
            pass  # no op of the IR takes these types: torch's own does
        self._undo(before)
        self.env[node] = self._foreign(node)

    def _undo(self, before: int) -> None:
        """Take back the nodes from here on, and known values that they were; who asks for one again makes it again."""
        gone = {v for n in self.builder.nodes[before:] for v in n.outputs}
        del self.builder.nodes[before:]
        self.env = {k: v for k, v in self.env.items() if not gone.intersection(v if isinstance(v, tuple) else (v,))}
        self.places = None if self.places in gone else self.places

    def _table(self, table: Table) -> Value:
        if table.op == "turns":
            law = {k: v for k, v in table.attrs.items() if k not in ("columns",)}
            return pair(
                self, *(self.emit("rope_table", self.positions(), part=x, layout="once", **law) for x in ("cos", "sin"))
            )
        if table.op != "positions":
            return self.emit(table.op, self.positions(), **table.attrs)
        p = self.positions()
        return p if table.attrs["shape"] == "b t" else self.emit("aten", p, target="aten.narrow.default", args="x0, 0, 0, 1")

    def _handled(self, node: fx.Node) -> Value | tuple[Value, ...] | None:
        if touches_complex(node):
            return self._paired(node)
        rule = HANDLERS.get(_target(node)) or HANDLERS.get(_target(node).split(".")[0])
        return rule(self, node) if rule is not None else None

    def _paired(self, node: fx.Node) -> Value | tuple[Value, ...]:
        """A call that makes or reads complex numbers, in real ones."""
        rule = COMPLEX.get(_target(node))
        made = rule(self, node) if rule is not None else None
        if made is None or not self._fits(node, made):
            raise TraceError(f"{node.target} of complex numbers has no form in real ones here{_line(node)}")
        return made

    def _fits(self, node: fx.Node, made: Value | tuple[Value, ...]) -> bool:
        wanted = node.meta["val"]
        results, tensors = (
            (made if isinstance(made, tuple) else (made,)),
            wanted if isinstance(wanted, tuple | list) else [wanted],
        )
        return [v.type for v in results] == [self.symbols.type(x) for x in tensors]

    # -- what stays torch's ----------------------------------------------------------------

    def _foreign(self, node: fx.Node) -> Value | tuple[Value, ...]:
        target = str(node.target)
        if not target.startswith("aten."):
            raise TraceError(f"{target} is no op of torch's own, and nothing here has it{_line(node)}")
        if _is_random(node):
            raise TraceError(f"{target} is random, and a graph is not: call eval() on the module first{_line(node)}")
        text_, operands = _Arguments(self, node).written()
        operands = operands or [self.value(self.inputs[0])]  # a table out of numbers is made where the first input is
        if len(operands) > OPERANDS:
            raise TraceError(f"{target} has {len(operands)} operands, at most {OPERANDS} can stand in a graph{_line(node)}")
        try:
            made = self.all("aten", *operands, target=target, args=text_)
        except TypeMismatch as error:
            raise TraceError(f"{error}{_line(node)}") from None
        wanted = node.meta["val"]
        if not self._fits(node, made):
            raise TraceError(f"{target} is {made[0].type} as a graph, but {wanted} in the trace{_line(node)}")
        return made if isinstance(wanted, tuple | list) else made[0]

    def _finish(self) -> Built:
        program = self.exported.program
        output = next(n for n in program.graph.nodes if n.op == "output")
        leaves, results, places = list(output.args[0]), list[Value](), list[int | None]()
        for leaf in leaves:
            if leaf is None:
                places.append(None)
                continue
            if not isinstance(leaf, fx.Node) or not isinstance(leaf.meta.get("val"), Tensor) or is_complex(leaf):
                raise TraceError(f"the module returns {leaf}; it must return real tensors, or trees of them")
            places.append(len(results))
            results.append(self.value(leaf))
        given = self.exported.leaves
        which = tuple(i for i, x in enumerate(given) if isinstance(x, Tensor))
        return Built(self.builder.finish(results), self.weights, which, tuple(places))


class _Arguments:
    """Arguments of a call as text, and the operands that it speaks of."""

    def __init__(self, tracing: Tracing, node: fx.Node) -> None:
        self.tracing, self.node, self.operands = tracing, node, list[Value]()

    def written(self) -> tuple[str, list[Value]]:
        schema: Any = self.node.target._schema  # type: ignore[union-attr] # an op of torch
        named = dict(zip((a.name for a in schema.arguments), self.node.args, strict=False)) | dict(self.node.kwargs)
        self._tensors(list(named.values()))
        parts, by_name = list[str](), False
        for wanted in schema.arguments:
            if wanted.name in PLACED or wanted.name not in named:
                by_name = True
                continue
            default = wanted.default_value if wanted.has_default_value() else ...
            if default is not ... and named[wanted.name] == default and not isinstance(named[wanted.name], fx.Node):
                by_name = True
                continue
            shown = self._shown(named[wanted.name])
            parts.append(f"{wanted.name}={shown}" if by_name or wanted.kwarg_only else shown)
        return ", ".join(parts), self.operands

    def _tensors(self, tree: Any) -> None:
        """Tensors are operands in the order of the call; sizes are then read off them."""
        if isinstance(tree, list | tuple):
            for x in tree:  # type: ignore[reportUnknownVariableType] # any tree
                self._tensors(x)
        elif isinstance(tree, fx.Node) and isinstance(tree.meta.get("val"), Tensor):
            self._index(self.tracing.value(tree))

    def _index(self, value: Value) -> int:
        if value not in self.operands:
            self.operands.append(value)
        return self.operands.index(value)

    def _shown(self, a: Any) -> str:
        if isinstance(a, list | tuple):
            return f"[{', '.join(self._shown(x) for x in a)}]"  # type: ignore[reportUnknownVariableType] # any tree
        if isinstance(a, torch.dtype):
            if a not in NAMES:
                raise TraceError(f"{self.node.target} makes {a}, must be one of {', '.join(NAMES.values())}{_line(self.node)}")
            return NAMES[a]
        if isinstance(a, fx.Node):
            value = a.meta.get("val")
            return f"x{self._index(self.tracing.value(a))}" if isinstance(value, Tensor) else self._size(value)
        if isinstance(a, torch.SymInt):
            return self._size(a)
        if a is None or isinstance(a, bool | int | float | str):
            return repr(a)
        raise TraceError(
            f"{self.node.target} is called with {a!r}; only tensors, sizes, numbers and text can be{_line(self.node)}"
        )

    def _size(self, n: Any) -> str:
        """`4*x0[1]+3`: each symbol by an operand that has it, else by an input that is taken along."""
        if not isinstance(n, int | torch.SymInt):
            raise TraceError(f"{self.node.target} needs {n}, a number that depends on data; a graph has none{_line(self.node)}")
        size = self.tracing.symbols.size(n)
        if isinstance(size, int):
            return str(size)
        return re.sub(r"[A-Za-z_]\w*", lambda found: self._named(found[0]), size)

    def _named(self, symbol: str) -> str:
        inputs = [self.tracing.value(n) for n in self.tracing.inputs]
        for value in (*self.operands, *inputs):
            for i, n in enumerate(value.type.shape):
                if n == symbol:
                    return f"x{self._index(value)}[{i}]"
        raise TraceError(f"{self.node.target} needs size {symbol}, which no input has alone{_line(self.node)}")


def _pattern(made: Rearrangement) -> str | None:
    """A last dim of one that comes or goes is written for any number of dims before it."""
    if made.right == (*made.left, ()):
        return "... -> ... u=1"
    return "... u=1 -> ..." if made.left == (*made.right, ()) else text(made)


class _Fresh:
    """Names of inputs and parameters: identifiers, each once."""

    def __init__(self) -> None:
        self.used = set(OPS)

    def __call__(self, name: str) -> str:
        made, n = name, 0
        while made in self.used:
            n += 1
            made = f"{name}_{n}"
        self.used.add(made)
        return made


def _plain(name: str) -> str:
    made = re.sub(r"\W", "_", name, flags=re.ASCII)
    return made if made and not made[0].isdigit() else f"m_{made}"


def _is_random(node: fx.Node) -> bool:
    """Whether torch draws numbers for it; attention does only where it drops some."""
    call: Any = node
    quiet = "attention" in str(call.target) and not argument(call, 4, "dropout_p", 0.0)
    return torch.Tag.nondeterministic_seeded in call.target.tags and not quiet


def _target(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.")


def _path(node: fx.Node) -> str:
    """The module that a call was made in, as the module's own dotted name."""
    stack: Sequence[tuple[str, Any]] = list((node.meta.get("nn_module_stack") or {}).values())
    path = re.sub(r"^L\['self'\]\.?|[^\w.]", "", stack[-1][0]) if stack else ""
    return re.sub(r"^module(\.|$)", "", path.strip("."))


def _line(node: fx.Node) -> str:
    """Where the user's code makes this call."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    shown = [x.strip() for x in trace[-2:]]
    found = re.search(r'([^/\\"]+)", line (\d+)', shown[0]) if shown else None
    where = f"{found[1]}, line {found[2]}: {shown[-1]}" if found else ""
    module = _path(node)
    return f" (in {module or 'the module'}{'; ' + where if where else ''})"


def build_graph(exported: Exported) -> Built:
    """The graph of an exported module, without any pass."""
    return Tracing(exported).run()


__all__ = ["Built", "build_graph", "ops"]
