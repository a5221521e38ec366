"""Running Triton kernels on CPU tensors, launch by launch, in a process that also compiles them."""

from __future__ import annotations

import ast
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

from ...ir import PlaitError
from ...ir.trees import tree
from .trap import Launch, watched

# Interpreting replaces parts of triton.language for as long as a launch takes: nothing may compile meanwhile.
LOCK = threading.RLock()
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")  # of a launch, without a meaning here
TO_TENSOR, LOOP, CONDITION = "_plait_to_tensor", "_plait_loop", "_plait_condition"


class KernelError(PlaitError):
    """A kernel that cannot run: its message says which program and line."""


def run(kernel: Any, grid: int | tuple[int, ...] | Callable[[Mapping[str, Any]], Any], *args: Any, **meta: Any) -> None:
    """Launch a `@triton.jit` function on CPU tensors; every access is checked (see `watch` to count them too)."""
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        raise KernelError(
            f"run: the kernel is a {type(kernel).__name__}; it must be a @triton.jit function (with TRITON_INTERPRET unset)"
        )
    named = _bound(kernel, args, meta)
    shape = grid(named) if callable(grid) else grid
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not 1 <= len(sizes) <= 3 or any(n < 0 for n in sizes):
        raise KernelError(f"{kernel.__name__}: the grid is {sizes}; it must be one to three sizes, none below zero")
    with LOCK:
        _launch(kernel, (*sizes, 1, 1)[:3], named)


def _bound(kernel: Any, args: tuple[Any, ...], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter with its argument."""
    given = {k: v for k, v in meta.items() if k in kernel.arg_names or k not in OPTIONS}
    try:
        bound = kernel.signature.bind(*args, **given)
    except TypeError as error:
        names = ", ".join(kernel.arg_names)
        raise KernelError(f"{kernel.__name__}({names}) cannot be launched so: {error}") from None
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise KernelError(f"{kernel.__name__}: {name} is on {value.device}; a kernel is interpreted on CPU tensors")
    return dict(bound.arguments)


def _launch(kernel: Any, sizes: tuple[int, ...], named: Mapping[str, Any]) -> None:
    import numpy as np
    from triton.runtime import interpreter

    from .interpret_ops import Builder

    launch = Launch(kernel.__name__, watched())
    builder: Any = Builder(launch)
    with _session(builder) as rewritten, np.errstate(all="ignore"):
        constant = {p.name for p in kernel.params if p.is_constexpr}
        values = {k: v if k in constant else _argument(v, k, launch, interpreter) for k, v in named.items()}
        function = rewritten(kernel)
        builder.set_grid_dim(*sizes)
        for program in product(*map(range, sizes)):
            builder.set_grid_idx(*program)
            launch.begin_program()
            try:
                function(**values)
            except Exception as error:  # whatever a kernel's text may raise
                raise _located(error, kernel, program) from error
            launch.end_program()


def _located(error: Exception, kernel: Any, program: tuple[int, ...]) -> PlaitError:
    """The error with the innermost line of kernel text that it comes from."""
    ours = kernel.fn.__code__.co_filename
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == ours]
    line = f", line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    reason = str(error) if isinstance(error, PlaitError) else repr(error)
    kind = type(error) if isinstance(error, PlaitError) else KernelError
    return kind(f"{kernel.__name__}, program {program}{line}: {reason}")


# -- Triton's language, replaced for one launch -----------------------------------------------


@contextmanager
def _session(builder: Any) -> Generator[Callable[[Any], FunctionType]]:
    """Make triton.language compute; gives the function that rewrites a kernel. All is as before at the end."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from . import libdevice

    jit: Any = JITFunction
    owners: list[Any] = [interpreter, tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, jit]
    owners += libdevice.MODULES
    before = [(owner, dict(vars(owner))) for owner in owners]
    try:
        stand_ins = _replace(builder, tl, interpreter)
        cache = dict[Any, FunctionType]()

        def rewritten(kernel: Any) -> FunctionType:  # by its Python function: a JITFunction's hash reads what it calls
            if kernel.fn not in cache:
                cache[kernel.fn] = _rewrite(kernel, stand_ins, interpreter)
            return cache[kernel.fn]

        def call(kernel: Any, *args: Any, **named: Any) -> Any:
            return rewritten(kernel)(*args, **named)

        jit.__call__ = call
        yield rewritten
    finally:
        for owner, names in before:
            _restore(owner, names)


def _replace(builder: Any, tl: Any, interpreter: Any) -> dict[Any, Callable[..., Any]]:
    """Let builtins compute with this builder; gives what stands in for functions that have no builder."""
    from triton.language.semantic import TritonSemantic

    from . import interpret_ops, libdevice

    interpreter.interpreter_builder, interpreter.interpreter_semantic = builder, TritonSemantic(builder)
    interpreter.ReduceOps, interpreter.ScanOps = interpret_ops.Reduce, interpret_ops.Scan
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    tl.tensor.__index__ = _as_int
    stand_ins = libdevice.stand_ins()
    for module in libdevice.MODULES:
        for name, function in list(vars(module).items()):
            if isinstance(function, FunctionType) and function in stand_ins:
                setattr(module, name, stand_ins[function])
    return stand_ins


def _restore(owner: Any, before: Mapping[str, Any]) -> None:
    for name, value in dict(vars(owner)).items():
        if name not in before and not isinstance(value, ModuleType):
            delattr(owner, name)
        elif name in before and before[name] is not value:
            setattr(owner, name, before[name])
    for name in before.keys() - vars(owner).keys():
        setattr(owner, name, before[name])


def _as_int(value: Any) -> int:
    return int(value.handle.data.reshape(-1)[0])


def _argument(value: Any, name: str, launch: Launch, interpreter: Any) -> Any:
    """A launch argument as the tensor that a kernel sees."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.jit import mangle_type

    if isinstance(value, tuple):
        return tuple(_argument(v, f"{name}[{i}]", launch, interpreter) for i, v in enumerate(value))
    if isinstance(value, torch.Tensor):
        dtype: Any = tl.str_to_ty(mangle_type(value), None)
        data = np.array([launch.pointer(value, name)], np.uint64)
    elif isinstance(value, bool):
        data, dtype = np.array([value]), tl.int1
    elif isinstance(value, float):
        data, dtype = np.array([value], np.float32), tl.float32
    elif isinstance(value, int):
        dtype = tl.int32 if -(2**31) <= value < 2**31 else tl.int64 if value < 2**63 else tl.uint64
        data = np.array([value], interpreter._get_np_dtype(dtype))
    elif hasattr(value, "block_shape"):  # a tensor descriptor, which converts its own parts
        return _descriptor(value, name, launch, interpreter)
    else:
        return value
    return tl.tensor(interpreter.TensorHandle(data, dtype), dtype)


def _descriptor(value: Any, name: str, launch: Launch, interpreter: Any) -> Any:
    convert = interpreter._implicit_cvt

    def part(inner: Any) -> Any:
        return _argument(inner, name, launch, interpreter)

    interpreter._implicit_cvt = part
    try:
        return convert(value)
    finally:
        interpreter._implicit_cvt = convert


# -- kernels, rewritten -----------------------------------------------------------------------


class _Rewriter(ast.NodeTransformer):
    """Assigned numbers and loop variables are tensors, as they are when compiled."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        node.value = ast.Call(ast.Name(TO_TENSOR, ast.Load()), [node.value, ast.Constant(False)], [])
        return node

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        called = node.iter.func if isinstance(node.iter, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if isinstance(node.iter, ast.Call) and name == "range":
            node.iter.func = ast.Name(LOOP, ast.Load())
        return node

    def visit_If(self, node: ast.If) -> ast.If:
        self.generic_visit(node)
        node.test = ast.Call(ast.Name(CONDITION, ast.Load()), [node.test], [])
        return node

    def visit_While(self, node: ast.While) -> ast.While:
        self.generic_visit(node)
        node.test = ast.Call(ast.Name(CONDITION, ast.Load()), [node.test], [])
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """Defaults and annotations belong to the original."""
        self.generic_visit(node)
        node.decorator_list, node.returns = [], None
        node.args.defaults, node.args.kw_defaults = [], [None for _ in node.args.kwonlyargs]
        for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            arg.annotation = None
        return node


def _rewrite(kernel: Any, stand_ins: Mapping[Any, Any], interpreter: Any) -> FunctionType:
    """The kernel's Python function over its own globals, with the names that the rewriting brings."""
    fn = kernel.fn
    body = ast.fix_missing_locations(_Rewriter().visit(tree(kernel.src)))
    before = next(i for i, line in enumerate(kernel.raw_src) if line.lstrip().startswith("def "))
    ast.increment_lineno(body, kernel.starting_line_number + before - 1)
    whole = compile(body, fn.__code__.co_filename, "exec")
    code = next(c for c in whole.co_consts if isinstance(c, CodeType) and c.co_name == fn.__name__)
    cells = dict(zip(fn.__code__.co_freevars, (c.cell_contents for c in fn.__closure__ or ()), strict=True))
    names = {k: _stand_in(v, stand_ins, interpreter) for k, v in {**fn.__globals__, **cells}.items()}
    names |= {TO_TENSOR: interpreter.interpreter_semantic.to_tensor, LOOP: _loop, CONDITION: _condition}
    made = FunctionType(code, names, fn.__name__, fn.__defaults__)
    made.__kwdefaults__ = fn.__kwdefaults__
    return made


def _stand_in(value: Any, stand_ins: Mapping[Any, Any], interpreter: Any) -> Any:
    """A builtin that a module imported by name escapes the replacement, so it is replaced here."""
    if not isinstance(value, FunctionType):
        return value
    if value in stand_ins:
        return stand_ins[value]
    if getattr(value, "__triton_builtin__", False):
        return partial(value, _semantic=interpreter.interpreter_semantic)
    return value


def _condition(value: Any) -> Any:
    """What `if` and `while` ask; Triton's interpreter takes every block for true."""
    if hasattr(value, "handle") and value.handle.data.size != 1:
        raise KernelError(f"a block of shape {value.handle.data.shape} is no condition; use tl.where")
    return value


def _loop(*bounds: Any, step: Any = None, **hints: Any) -> Iterator[Any]:
    """`range` and `tl.range`: bounds known at run time, and a loop variable that is a tensor."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    given = [*bounds] if step is None else [*((0, *bounds)[-2:]), step]
    values = [int(b.value if isinstance(b, tl.constexpr) else _as_int(b) if isinstance(b, tl.tensor) else b) for b in given]
    long = any(isinstance(b, tl.tensor) and b.dtype == tl.int64 for b in given) or max(map(abs, values)) >= 2**31
    dtype, kind = (tl.int64, np.int64) if long else (tl.int32, np.int32)
    for i in range(*values):
        yield tl.tensor(TensorHandle(np.array([i], kind), dtype), dtype)
