"""Torch's own ops as one op: what an eager module computes and no op here has a name for.

`y = aten(x, w, target='aten.add.Tensor', args='x0, x1, alpha=2')`: the arguments are text in the order that torch takes
them. `x0` is an operand, `x0[1]` the size of its second dim, `4*x0[1]+1` what is computed of it, `bf16` a dtype.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..errors import PlaitError, TypeMismatch
from ..op import op
from ..signature import Binding, Use
from ..sizes import Size, times, value
from ..types import DTYPES, Dim, TensorType

Tensor = torch.Tensor
OPERANDS = 16
FORBIDDEN = ("from_file", "set_", "resize")  # what reads files, or changes what it is given
POINTWISE = torch.Tag.pointwise
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRIMES = (101, 103, 107, 109, 113, 127), (211, 223, 227, 229, 233, 239), (307, 311, 313, 317, 331, 337)


@dataclass(frozen=True)
class Ref:
    """An operand, or the size of one of its dims."""

    operand: int
    dim: int | None = None


@dataclass(frozen=True)
class Computed:
    """A product and a constant of sizes."""

    factors: tuple[Ref, ...]
    times: int
    plus: int


@dataclass(frozen=True)
class Arguments:
    """What an aten op is called with; leaves are constants, dtypes, `Ref` and `Computed`."""

    positional: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]

    def filled(self, leaf: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with each operand and size replaced."""
        return tuple(_filled(a, leaf) for a in self.positional), {k: _filled(a, leaf) for k, a in self.named}


def _filled(argument: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(argument, tuple):
        return [_filled(a, leaf) for a in argument]  # type: ignore[reportUnknownVariableType] # leaves of any kind
    return leaf(argument) if isinstance(argument, Ref | Computed) else argument


def resolved(target: str) -> Any:
    """The torch op of this name; a TypeMismatch where there is none, or where it would change its operands."""
    parts = target.split(".")
    if len(parts) != 3 or parts[0] != "aten" or parts[1].startswith(FORBIDDEN) or not all(p.isidentifier() for p in parts):
        raise TypeMismatch(f"aten: target is {target[:60]!r}, must be an op of torch such as 'aten.add.Tensor'")
    packet = getattr(torch.ops.aten, parts[1], None)
    found = getattr(packet, parts[2], None) if packet is not None and parts[2] in packet.overloads() else None
    if found is None:
        raise TypeMismatch(f"aten: torch {torch.__version__} has no op {target[:60]}")
    if found._schema.is_mutable:
        raise TypeMismatch(f"aten: {target} changes what it is given; only ops that do not can stand in a graph")
    return found


@lru_cache(maxsize=4096)
def arguments(text: str) -> Arguments:
    """Text of arguments as data; a TypeMismatch where it does not parse."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise TypeMismatch(f"aten: args is {text[:60]!r}, must be arguments such as 'x0, [x0[1], 4], dim=-1'") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or any(k.arg is None for k in call.keywords):
        raise TypeMismatch(f"aten: args is {text[:60]!r}, must be arguments such as 'x0, [x0[1], 4], dim=-1'")
    named = tuple((str(k.arg), _read(k.value, text)) for k in call.keywords)
    return Arguments(tuple(_read(a, text) for a in call.args), named)


def _read(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() | bool() | None as constant):
            return constant
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name(id="inf"):
            return float("inf")
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return -float("inf")
        case ast.Name(id=name) if name in DTYPES:
            return DTYPES[name]
        case ast.List(elts=items):
            return tuple(_read(item, text) for item in items)
        case ast.Name() | ast.Subscript():
            return _ref(node, text)
        case ast.BinOp():
            return _computed(node, text)
        case _:
            raise TypeMismatch(f"aten: args is {text[:60]!r}; an argument is a number, text, dtype, operand, size or list")


def _ref(node: ast.expr, text: str) -> Ref:
    match node:
        case ast.Name(id=name) if name[:1] == "x" and name[1:].isdecimal() and int(name[1:]) < OPERANDS:
            return Ref(int(name[1:]))
        case ast.Subscript(value=ast.Name() as inner, slice=ast.Constant(value=int() as dim)):
            return Ref(_ref(inner, text).operand, dim)
        case _:
            raise TypeMismatch(f"aten: args is {text[:60]!r}; an operand is x0 to x{OPERANDS - 1}, a size x0[1]")


def _computed(node: ast.expr, text: str) -> Computed:
    """`4*x0[0]*x0[1]+3`."""
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=ast.Constant(value=int() as n)):
            inner = _computed(left, text)
            return Computed(inner.factors, inner.times, inner.plus + (n if isinstance(sign, ast.Add) else -n))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            a, b = _computed(left, text), _computed(right, text)
            if a.plus or b.plus:
                raise TypeMismatch(f"aten: args is {text[:60]!r}; a size is a product of sizes, plus a number")
            return Computed(a.factors + b.factors, a.times * b.times, 0)
        case ast.Constant(value=int() as n):
            return Computed((), n, 0)
        case _:
            return Computed((_ref(node, text),), 1, 0)


def _called(target: str, text: str, xs: Sequence[Any]) -> tuple[Any, ...]:
    def leaf(at: Any) -> Any:
        if isinstance(at, Computed):
            total = at.times
            for factor in at.factors:
                total = total * leaf(factor)
            return total + at.plus
        tensor = xs[at.operand] if at.operand < len(xs) else None
        if tensor is None:
            raise TypeMismatch(f"aten: args is {text[:60]!r}, but there is no operand x{at.operand}")
        return tensor if at.dim is None else tensor.shape[at.dim]

    positional, named = arguments(text).filled(leaf)
    device = next((x.device for x in xs if x is not None), None)
    made = resolved(target)(*positional, **named, **({"device": device} if takes_device(target) else {}))
    return tuple(made) if isinstance(made, list | tuple) else (made,)


@lru_cache(maxsize=1024)
def takes_device(target: str) -> bool:
    """Whether it makes a tensor out of nothing, which is to be where its operands are."""
    names = {a.name: str(a.type) for a in resolved(target)._schema.arguments}
    return "device" in names and not any(kind.startswith("Tensor") for kind in names.values())


_SIGNATURE = ", ".join(["x0[...]", *(f"x{i}[...]?" for i in range(1, OPERANDS))])


@op(f"{_SIGNATURE} -> y[...]", map="...")
def aten(x0: Tensor, *others: Tensor | None, target: str, args: str) -> Any:
    """An op of torch by its name, `args` being its arguments as text: x0 an operand, x0[1] one of its sizes

    Its types are those of torch's own meta kernels. A split is met by pointwise ops alone, in dims that all have.
    """
    made = _called(target, args, (x0, *others))
    return made[0] if len(made) == 1 else made


@aten.infers
def _(*types: TensorType | None, target: str, args: str) -> tuple[TensorType, ...]:
    """Which op it is says an attribute, which letters cannot: torch's meta kernels are asked, at three sets of sizes."""
    found = _inferred(target, args, tuple(t if t is None else _bare(t) for t in types))
    if not any(t is not None and (t.partial or any(d.axes or d.order for d in t.dims)) for t in types):
        return found
    bound, _, _ = aten.placed(types, {"target": target, "args": args})
    made = found[0]
    dims = [bound.dim(f"...{i}") if f"...{i}" in bound.uses else d for i, d in enumerate(made.dims)]
    return (TensorType(made.dtype, tuple(dims)), *found[1:])


def _bare(type_: TensorType) -> TensorType:
    return TensorType(type_.dtype, tuple(d.bare for d in type_.dims))


@lru_cache(maxsize=4096)
def _inferred(target: str, args: str, types: tuple[TensorType | None, ...]) -> tuple[TensorType, ...]:
    symbols = sorted({s for t in types if t is not None for s in t.symbols})
    if len(symbols) > len(PRIMES[0]):
        raise TypeMismatch(f"aten: {target} has {len(symbols)} symbolic sizes, at most {len(PRIMES[0])} can be told apart")
    tries = [dict(zip(symbols, primes, strict=False)) for primes in (PRIMES if symbols else PRIMES[:1])]
    runs = [_on_meta(target, args, types, env) for env in tries]
    results = list[TensorType]()
    for same in zip(*runs, strict=True):
        if same[0].dtype not in NAMES:
            raise TypeMismatch(f"aten: {target} gives {same[0].dtype}, must be one of {', '.join(DTYPES)}")
        shapes = zip(*(tuple(x.shape) for x in same), strict=True)
        results.append(TensorType(NAMES[same[0].dtype], tuple(Dim(_size(target, n, tries)) for n in shapes)))
    return tuple(results)


def _on_meta(target: str, args: str, types: Sequence[TensorType | None], env: Mapping[str, int]) -> tuple[Tensor, ...]:
    def made(t: TensorType) -> Tensor:
        return torch.empty([value(d.size, env) for d in t.dims], dtype=DTYPES[t.dtype], device="meta")

    try:
        return _called(target, args, [t if t is None else made(t) for t in types])
    except PlaitError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise TypeMismatch(f"aten: {target}({args[:60]}) cannot be typed: {why}") from None


def _size(target: str, seen: Sequence[int], tries: Sequence[Mapping[str, int]]) -> Size:
    """The product of symbols, plus a number, that has these values."""
    if len(set(seen)) == 1:
        return seen[0]
    symbols = list(tries[0])
    for names in [*([s] for s in symbols), *([s, t] for i, s in enumerate(symbols) for t in symbols[i:])]:
        parts = [value(times(*names), env) for env in tries]
        factor, odd = divmod(seen[1] - seen[0], parts[1] - parts[0])
        if not odd and all(n - factor * p == seen[0] - factor * parts[0] for n, p in zip(seen, parts, strict=True)):
            offset = seen[0] - factor * parts[0]
            product = times(factor, *names)
            return f"{product}{offset:+d}" if offset else product
    raise TypeMismatch(f"aten: {target} gives a size that is no product of {', '.join(symbols)} plus a number")


def _bind(types: Sequence[TensorType | None], attrs: Mapping[str, Any]) -> Binding:
    """Letters `...0` of a pointwise op's result stand for the dims that operands share with it; all others are whole."""
    shared = POINTWISE in resolved(attrs["target"]).tags
    bare = tuple(t if t is None else _bare(t) for t in types)
    made = _inferred(attrs["target"], attrs["args"], bare)[0].dims if shared else ()
    uses, size = dict[str, list[Use]](), dict[str, Size]()
    for i, t in enumerate(types):
        for j, dim in enumerate(t.dims if t is not None else ()):
            at = len(made) - len(t.dims if t is not None else ()) + j
            letter = f"...{at}" if shared and made[at].size == dim.size and dim.size != 1 else f"x{i}_{j}"
            uses.setdefault(letter, []).append(Use(i, j, dim))
            size[letter] = dim.size
    return Binding({k: tuple(v) for k, v in uses.items()}, size, len(made))


def _role(letter: str) -> str:
    return "map" if letter.startswith("...") else "whole"


aten.bind, aten.role = _bind, _role  # letters depend on which op it is: what a signature cannot say

# As programs; where the compiled module runs, autograd has the gradient of every op of torch.
DERIVATIVES = {
    "aten.sin.default": "aten(x0, target='aten.cos.default', args='x0')",
    "aten.cos.default": "scale(aten(x0, target='aten.sin.default', args='x0'), by=-1.0)",
}


@aten.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """That of the ops whose derivative is written as a program."""
    if attrs["args"] != "x0" or attrs["target"] not in DERIVATIVES:
        known = ", ".join(DERIVATIVES)
        raise PlaitError(f"aten has no gradient as a program for {attrs['target']}({attrs['args'][:40]}), only for {known}")
    return f"d_x0 = mul(widen(d_y), widen({DERIVATIVES[attrs['target']]}))"


@aten.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 5), {"target": "aten.sin.default", "args": "x0"}]
