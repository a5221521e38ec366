"""A layer straight from its fx module to machine code: no bytecode is traced, and what was made is found again by its key."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from ..ir import Graph, PlaitError
from ..ir.files import write_atomic
from ..ir.sizes import symbols, value

Tensor = torch.Tensor
Call = Callable[..., Any]
PLAIN = (Tensor, torch.nn.Parameter)
DIGEST = 32  # bytes in front of kept code that vouch for the rest
VERSIONS = 4  # of one layer's code, each for other sizes, that are kept
RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}
_LOCK = threading.RLock()


def direct(args: Sequence[Any]) -> bool:
    """Whether these are what a layer may be compiled for by itself: plain dense CPU tensors under no mode or transform."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()  # type: ignore[reportPrivateUsage] # no public name
    transforms = torch._C._functorch.peek_interpreter_stack()  # type: ignore[reportPrivateUsage] # no public name
    if modes or transforms is not None or torch.is_autocast_enabled("cpu"):
        return False
    return all(type(a) in PLAIN and a.device.type == "cpu" and a.is_contiguous() for a in args)


@dataclass(frozen=True)
class Limit:
    """A sum of products of operands' sizes, and how it must compare with zero."""

    relation: str
    terms: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]

    def holds(self, args: Sequence[Tensor]) -> bool:
        return RELATIONS[self.relation](sum(n * math.prod(args[i].shape[d] for i, d in at) for n, at in self.terms), 0)


@dataclass(frozen=True)
class Code:
    """What runs a layer, and for which sizes it was written."""

    call: Call
    limits: tuple[Limit, ...]

    def serves(self, args: Sequence[Tensor]) -> bool:
        return all(limit.holds(args) for limit in self.limits)


def compile_ahead(module: fx.GraphModule, graph: Graph, args: Sequence[Tensor], mark: str) -> Code | None:
    """Code for these operands and all that differ in their sizes within limits; None where limits cannot be said so."""
    places = bindings(graph, args)
    if places is None or any(d.axes for v in (*graph.inputs, *graph.params) for d in v.type.dims):
        return None
    with _LOCK:
        mode, fakes, names = _stand_ins(graph, args, places)
        key = _key(module, graph, fakes, mark)
        files = [_file(key).with_suffix(f".{i}") for i in range(VERSIONS)]
        kept = next((code for file in files if (code := _load(file)) is not None and code.serves(args)), None)
        if kept is not None:
            return kept
        made = _compiled(flattened(module), fakes, mode)
        limits = _limits(mode.shape_env.guards, {symbol: places[name] for symbol, name in names.items()})
        if limits is None:
            return None
        _save(next((file for file in files if not file.exists()), files[-1]), made, limits)
        return Code(made, limits)


def _limits(guards: Sequence[Any], places: dict[Any, tuple[int, int]]) -> tuple[Limit, ...] | None:
    """What was assumed of sizes while code was written; None where that is more than polynomials."""
    import sympy

    found = list[Limit]()
    for expression in dict.fromkeys(guard.expr for guard in guards):
        if getattr(expression, "rel_op", None) not in RELATIONS:
            return None
        try:
            poly = sympy.Poly(expression.lhs - expression.rhs, *places)
            terms = [(int(n), tuple(at for at, times in zip(places.values(), powers, strict=True) for _ in range(times)))
                     for powers, n in poly.terms()]  # fmt: skip
        except (sympy.PolynomialError, TypeError):
            return None
        found.append(Limit(expression.rel_op, tuple(terms)))
    return tuple(found)


# -- operands -----------------------------------------------------------------------------


def bindings(graph: Graph, args: Sequence[Tensor]) -> dict[str, tuple[int, int]] | None:
    """Where each size variable of a layer is read, as operand and dim; None where two dims disagree or there is no such dim."""
    found, needed = dict[str, tuple[int, int]](), set[str]()
    for i, (v, a) in enumerate(zip(graph.inputs, args, strict=False)):
        for d, dim in enumerate(v.type.dims):
            needed |= symbols(dim.size) if isinstance(dim.size, str) else set()
            if isinstance(dim.size, str) and symbols(dim.size) == {dim.size}:
                j, e = found.setdefault(dim.size, (i, d))
                if args[j].shape[e] != a.shape[d]:
                    return None
    return found if needed == found.keys() else None


def _stand_ins(
    graph: Graph, args: Sequence[Tensor], places: dict[str, tuple[int, int]]
) -> tuple[Any, list[Tensor], dict[Any, str]]:
    """Operands without numbers: a variable of the graph is one symbol, but for a size of one or none, which is itself."""
    from torch._dynamo.source import ConstantSource  # slow to import, as all that compiles is
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env, names = ShapeEnv(duck_shape=False), dict[Any, str]()
    sizes: dict[str, Any] = {name: args[i].shape[d] for name, (i, d) in places.items()}
    for name, size in sizes.items():
        if size > 1:
            source = ConstantSource(f"size_{name}")
            symbol = env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
            names[symbol], sizes[name] = name, env.create_symintnode(symbol, hint=size, source=source)
    mode, wanted = FakeTensorMode(shape_env=env), wants_gradients(args)
    shapes = [[value(d.size, sizes) if isinstance(d.size, str) else d.size for d in v.type.dims] for v in graph.inputs]
    with mode:
        activations = [_fake(shape, a, wanted) for shape, a in zip(shapes, args, strict=False)]
        return mode, [*activations, *(_fake(a.shape, a, False) for a in args[len(shapes) :])], names


def _fake(shape: Sequence[Any], like: Tensor, wanted: bool) -> Tensor:
    """Every activation wants a gradient where anything does: which ones really do is no reason to compile again."""
    made = torch.empty(shape, dtype=like.dtype)
    return made.requires_grad_(like.requires_grad or (wanted and like.is_floating_point()))


def wants_gradients(args: Sequence[Tensor]) -> bool:
    """Whether a backward may follow the call."""
    return torch.is_grad_enabled() and any(a.requires_grad for a in args)


# -- code ---------------------------------------------------------------------------------


def flattened(module: fx.GraphModule) -> fx.GraphModule:
    """The module with its kernels' nodes in place, and functions that can be found by name for all else."""
    graph, calls = fx.Graph(), list[Call]()
    operands = [graph.placeholder(n.name) for n in module.graph.find_nodes(op="placeholder")]
    graph.output(_inlined(graph, module, operands, calls))
    return fx.GraphModule(torch.nn.Module(), graph, "Layer")


def _inlined(graph: fx.Graph, module: torch.nn.Module, operands: Sequence[Any], calls: list[Call]) -> Any:
    """A graph's nodes; a module that is none, such as one that looks at sizes, is one call."""
    if not isinstance(module, fx.GraphModule):
        return graph.call_function(_named(module.forward, calls), tuple(operands))
    env = dict[fx.Node, Any](zip(module.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "output":
            return args[0]
        env[node] = _copied(graph, module, node, args, kwargs, calls)
    raise AssertionError("a graph ends with its output")


def _copied(graph: fx.Graph, module: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any, calls: list[Call]) -> Any:
    target: Any = node.target
    if node.op == "call_module":
        return _inlined(graph, module.get_submodule(target), args, calls)
    if target is operator.getitem and isinstance(args[0], tuple):
        return args[0][args[1]]
    if node.op == "call_method":
        target = getattr(torch, target)
    known = isinstance(target, OpOverload) or target is operator.getitem
    return graph.call_function(target if known else _named(target, calls), args, kwargs)


def _named(target: Call, calls: list[Call]) -> Call:
    """A function that stands in this module while a layer is compiled: a cache wants to find by name what it keeps."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"call{len(calls)}"
    setattr(sys.modules[__name__], call.__name__, call)
    calls.append(call)
    return call


def _compiled(flat: fx.GraphModule, fakes: Sequence[Tensor], mode: Any) -> Any:
    from torch._inductor import config, standalone_compile
    from torch.compiler import config as caches

    # What is found in a cache does not say for which sizes it is: here is only compiled what `_load` does not have.
    tag = os.urandom(16).hex()
    ours = {f"{__name__}.{n.target.__name__}": tag for n in flat.graph.nodes if n.op == "call_function"}
    settings = cast("Any", config).patch({"unsafe_marked_cacheable_functions": ours, **_trusting()})
    with settings, cast("Any", caches).patch(cache_key_tag=tag):
        return standalone_compile(
            flat, [*fakes], dynamic_shapes="from_example_inputs", aot=True, donate_graph_module=True, fake_mode=mode
        )


def _trusting() -> dict[str, Any]:
    """A compiler of this C++ knows the vector instructions that the processor has; asking it builds a library for each set."""
    from torch._inductor import config

    return {"cpp.vec_isa_ok": True} if config.cpp.vec_isa_ok is None else {}


# -- kept code ----------------------------------------------------------------------------


def _key(module: fx.GraphModule, graph: Graph, fakes: Sequence[Tensor], mark: str) -> str:
    """A digest of all that the code depends on."""
    from torch._inductor import config

    operands = [([str(n) for n in f.shape], f.dtype, f.requires_grad) for f in fakes]
    state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    rules = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    machine = (torch.__version__, torch.backends.cpu.get_cpu_capability(), sys.version, os.environ.get("CXX"))
    settings = cast("Any", config).save_config_portable()
    parts = (mark, graph.key, _texts(module), operands, state, rules, machine, sorted(settings.items(), key=str))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _texts(module: fx.GraphModule) -> list[tuple[str, str]]:
    """What runs the layer and each of its kernels: torch code, or a module of another kind."""
    parts = [(name, part) for name, part in module.named_modules() if part is not module]
    return [("", module.code), *((n, p.code if isinstance(p, fx.GraphModule) else type(p).__name__) for n, p in parts)]


def _file(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "plait" / key


def _load(file: Path) -> Code | None:
    """Kept code; None where there is none, or a file that is not whole or that others may write."""
    try:
        about, kept = file.stat(), file.read_bytes()
    except OSError:
        return None
    whole = hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]
    if not whole or about.st_uid != os.getuid() or about.st_mode & 0o022:
        return None
    from torch._inductor import config
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    head, _, data = kept[DIGEST:].partition(b"\n")
    limits = (
        Limit(relation, tuple((n, tuple((i, d) for i, d in at)) for n, at in terms)) for relation, terms in json.loads(head)
    )
    with cast("Any", config).patch(_trusting()):
        return Code(AOTCompiledArtifact.deserialize(data), tuple(limits))


def _save(file: Path, made: Any, limits: Sequence[Limit]) -> None:
    """Keeps code where the next process finds it; a directory that cannot be written keeps none."""
    if made.inner_fn.compiled_fn.serialize is None:  # something in the layer is not what torch knows how to keep
        return
    body = json.dumps([(limit.relation, limit.terms) for limit in limits]).encode() + b"\n" + made.serialize()
    with suppress(PlaitError):
        write_atomic(file, lambda beside: _written(beside, hashlib.sha256(body).digest() + body))


def _written(file: Path, data: bytes) -> None:
    file.write_bytes(data)
