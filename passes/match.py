"""Patterns: a few statements of the text form, and where a graph has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..ir import OPS, Node, OpDef, ParseError, Stmt, Value, Var, ops, parse_statements
from .remarks import suggestion

CLASSES: dict[str, tuple[str, ...]] = {"activation": ops.ACTIVATIONS, "norm": ("rms_norm", "layer_norm", "l2_norm")}


@dataclass(frozen=True)
class Match:
    """What the names of a pattern stand for."""

    values: Mapping[str, Value]
    attrs: Mapping[str, Any]
    nodes: Mapping[int, Node]  # by the index of the statement

    @property
    def members(self) -> tuple[Node, ...]:
        return tuple(dict.fromkeys(self.nodes[i] for i in sorted(self.nodes)))


@dataclass(frozen=True)
class Pattern:
    """Statements of which the last is the root. A callee is an op or a class of ops; an attribute left out matches anything.

    Operands left out are absent in the graph too, unless the pattern is `loose`.
    """

    statements: tuple[Stmt, ...]
    loose: bool = False

    @staticmethod
    def of(text: str, *, loose: bool = False) -> Pattern:
        pattern = Pattern(parse_statements(text), loose)
        for s in pattern.statements:
            _check_statement(s)
        if apart := pattern.unreached:
            raise ParseError(f"pattern: the last statement does not lead to {apart[0]}; each statement must")
        return pattern

    @cached_property
    def makers(self) -> dict[str, int]:
        """The statement that makes each name."""
        return {t: i for i, s in enumerate(self.statements) for t in s.targets}

    @property
    def unreached(self) -> list[str]:
        """Targets of statements that no chain of operands joins to the root."""
        found, waiting = set[int](), [len(self.statements) - 1]
        while waiting:
            i = waiting.pop()
            found.add(i)
            s = self.statements[i]
            names = (*s.args, *(v for v in s.named.values() if isinstance(v, str)))
            waiting += [self.makers[n] for n in names if n in self.makers and self.makers[n] not in found]
        return [t for i, s in enumerate(self.statements) if i not in found for t in s.targets]

    @property
    def root_ops(self) -> tuple[str, ...]:
        return members(self.statements[-1].callee)

    def find(self, root: Node, makers: Mapping[Value, Node]) -> Iterator[Match]:
        """Every way in which the pattern ends at this node."""
        return self._statement(len(self.statements) - 1, root, makers, Match({}, {}, {}))

    def _statement(self, index: int, node: Node, makers: Mapping[Value, Node], m: Match) -> Iterator[Match]:
        s = self.statements[index]
        if index in m.nodes:
            if m.nodes[index] is node:
                yield m
            return
        if not node.is_op(*members(s.callee)) or len(s.targets) != len(node.outputs):
            return
        attrs = _attributes(s, node, m.attrs)
        if attrs is None or any(m.values.get(t, v) is not v for t, v in zip(s.targets, node.outputs, strict=True)):
            return
        m = Match({**m.values, **dict(zip(s.targets, node.outputs, strict=True))}, attrs, {**m.nodes, index: node})
        for pairs in _pairings(s, node, self.loose):
            yield from self._operands(pairs, makers, m)

    def _operands(self, pairs: Sequence[tuple[str, Value]], makers: Mapping[Value, Node], m: Match) -> Iterator[Match]:
        if not pairs:
            yield m
            return
        (name, value), rest = pairs[0], pairs[1:]
        if m.values.get(name, value) is not value:
            return
        if name not in self.makers:
            yield from self._operands(rest, makers, Match({**m.values, name: value}, m.attrs, m.nodes))
        elif value in makers:
            for found in self._statement(self.makers[name], makers[value], makers, m):
                if found.values[name] is value:
                    yield from self._operands(rest, makers, found)


def members(callee: str) -> tuple[str, ...]:
    """The ops that a callee of a pattern may be."""
    return CLASSES.get(callee, (callee,))


def _check_statement(s: Stmt) -> None:
    """Refuse a pattern that can never match: an unknown op, operand or attribute."""
    if unknown := [n for n in members(s.callee) if n not in OPS]:
        raise ParseError(f"pattern: no op or class called {unknown[0]}; {suggestion(unknown[0], [*OPS, *CLASSES])}")
    found = [OPS[n] for n in members(s.callee)]
    if stray := [k for k in s.attrs if not any(k in op.attrs for op in found)]:
        raise ParseError(f"pattern: {s.callee} has no attribute {stray[0]}")
    if len(s.args) > max(len(op.inputs) for op in found):
        raise ParseError(f"pattern: {s.callee} is given {len(s.args)} operands, which it does not take")


def _attributes(s: Stmt, node: Node, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """The attribute variables with this node's values, or None where a written value differs."""
    found = dict(known)
    for key, want in s.attrs.items():
        if key not in node.attrs:
            return None
        have = node.attrs[key]
        expected = found.setdefault(want.name, have) if isinstance(want, Var) else want
        if expected != have:
            return None
    return found


def _pairings(s: Stmt, node: Node, loose: bool) -> list[list[tuple[str, Value]]]:
    """Pattern names with the operands they would stand for; both ways round for an op that commutes."""
    op = node.op
    if not isinstance(op, OpDef):
        return []
    wanted = dict(enumerate(s.args)) | {_position(op, k): str(v) for k, v in s.named.items()}
    present = {i: v for i, v in enumerate(node.inputs) if v is not None}
    if not wanted.keys() <= present.keys() or (not loose and wanted.keys() != present.keys()):
        return []
    pairs = [(name, present[i]) for i, name in wanted.items()]
    swapped = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])] if op.commutes and len(pairs) == 2 else []
    return [pairs, swapped] if swapped else [pairs]


def _position(op: OpDef, operand: str) -> int:
    return next(i for i, o in enumerate(op.inputs) if o.name == operand)
