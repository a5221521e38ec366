"""Cost text of an op, `2*b*t*i*o`, parsed once into an expression; nothing is ever evaluated as Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

from . import sizes as size_algebra
from .signature import Binding, rest_letters
from .trees import tree

Expression = Callable[[Mapping[str, int]], float]
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def parse(text: str, where: str) -> Expression:
    """Text over letters, numbers and + - * / to a function of the letters' sizes."""
    return _compile(cast(ast.Expression, tree(text, "eval")).body, where)


def _compile(node: ast.expr, where: str) -> Expression:
    match node:
        case ast.Constant(value=int() | float() as number):
            return lambda env: number
        case ast.Name(id=letter):
            return lambda env: env[letter]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            apply, a, b = _BINARY[type(op)], _compile(left, where), _compile(right, where)
            return lambda env: apply(a(env), b(env))
        case _:
            raise ValueError(f"{where}: cost text may hold letters, numbers and + - * /, got {ast.unparse(node)}")


def evaluate(expression: Expression, bound: Binding, attrs: Mapping[str, Any], env: Mapping[str, int]) -> int:
    """The cost for bound letters; `rest` stands for the product of an ellipsis."""
    letters = {k: size_algebra.value(v, env) for k, v in bound.size.items()}
    rest = math.prod(letters[x] for x in rest_letters(bound.rest) if x in letters)
    numbers = {k: v for k, v in attrs.items() if isinstance(v, int)}
    return int(expression({**numbers, **letters, "rest": rest}))
