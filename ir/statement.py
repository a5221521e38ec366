"""Statements of the text form, as graphs and rewrite rules have them, before anything is typed."""

from __future__ import annotations

import ast
import math
import re
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn, cast

from .errors import ParseError
from .trees import tree

MAX_TEXT = 16 * 2**20  # characters; more is no program a person or a pass wrote
MAX_DEPTH = 64  # of nested syntax; what reads it recurs


@dataclass(frozen=True)
class Var:
    """An attribute variable, legal only in rewrite rules."""

    name: str


@dataclass(frozen=True)
class Stmt:
    """`y, s = callee(x, w, bias=c, eps=1e-6)`: a keyword whose value is a name may be an operand."""

    targets: tuple[str, ...]
    callee: str
    args: tuple[str, ...]
    named: dict[str, str | Var]
    attrs: dict[str, Any]
    node: ast.AST = field(repr=False, compare=False)


@dataclass(frozen=True)
class Source:
    """Text being parsed, to point into."""

    text: str
    file: str = ""

    @cached_property
    def lines(self) -> list[str]:
        """Lines as Python's own parser counts them."""
        return re.split(r"\r\n|\r|\n", self.text)

    def fail(self, why: str, node: ast.AST | None = None, line: int = 0, column: int = 0) -> NoReturn:
        """Raise a ParseError that shows the line with a caret under the place."""
        line = getattr(node, "lineno", line)
        column = getattr(node, "col_offset", column)
        shown = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        if node is not None:
            column = len(shown.encode()[:column].decode(errors="ignore"))  # ast counts bytes
        start = max(0, column - 90)
        caret = f"\n  {shown[start : start + 110]}\n  {' ' * (column - start)}^" if shown else ""
        raise ParseError(f"{self.file or 'text'}, line {line}: {why}{caret}")


def syntax(source: Source) -> list[ast.stmt]:
    """Python statements of the text; every failure of Python's own parser becomes a ParseError."""
    if len(source.text) > MAX_TEXT:
        source.fail(f"the text has {len(source.text)} characters, at most {MAX_TEXT} are read", line=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in text is no business of the reader's
            body = cast(ast.Module, tree(source.text)).body
    except SyntaxError as error:
        source.fail(str(error.msg), line=error.lineno or 1, column=max(0, (error.offset or 1) - 1))
    except (ValueError, RecursionError, MemoryError) as error:
        source.fail(f"cannot be read: {type(error).__name__}", line=1)
    _check_depth(source, body)
    return body


def _check_depth(source: Source, body: list[ast.stmt]) -> None:
    """Refuse syntax that nests too deeply to be walked by recursion."""
    level: list[ast.AST] = [*body]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        source.fail("nested too deeply", next((n for n in level if hasattr(n, "lineno")), None), line=1)


def statement(source: Source, s: ast.stmt) -> Stmt:
    """One `y = callee(...)`."""
    if not (isinstance(s, ast.Assign) and isinstance(s.value, ast.Call) and isinstance(s.value.func, ast.Name)):
        source.fail("expected `y = op(x, attr=1)`", s)
    if len(s.targets) > 1:
        source.fail("`a = b = ...` is not allowed here; one equation has one left side", s)
    named, attrs = dict[str, str | Var](), dict[str, Any]()
    for keyword in s.value.keywords:
        if keyword.arg is None:
            source.fail("`**` is not allowed here", keyword)
        if keyword.arg in named or keyword.arg in attrs:
            source.fail(f"{keyword.arg} is given twice", keyword)
        if isinstance(keyword.value, ast.Name) and keyword.value.id not in ("inf", "nan"):
            named[keyword.arg] = keyword.value.id
        else:
            attrs[keyword.arg] = literal(source, keyword.value)
    args = tuple(n for a in s.value.args for n in names(source, a))
    return Stmt(names(source, s.targets[0]), s.value.func.id, args, named, attrs, s)


def literal(source: Source, node: ast.expr) -> Any:
    """A number, text, truth value, None, or tuple of these."""
    match node:
        case ast.Constant(value=int() | float() | str() | bool() | None as value):
            return value
        case ast.Name(id="inf"):
            return math.inf
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            inner_value = literal(source, inner)
            if not isinstance(inner_value, int | float):
                source.fail("only a number can be negative", node)
            return -inner_value
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return tuple(literal(source, e) for e in elements)
        case _:
            source.fail("an attribute is a number, text, True, False, None or a tuple of these", node)


def names(source: Source, node: ast.expr) -> tuple[str, ...]:
    """A name, or several."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Tuple):
        return tuple(n for e in node.elts for n in names(source, e))
    source.fail("expected a name", node)
