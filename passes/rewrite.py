"""Rewrite rules, written in the same text as graphs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir import OPS, Graph, Node, OpDef, ParseError, PassError, Replay, Stmt, Value, Var, parse_statements
from .match import CLASSES, Match, Pattern
from .remarks import Remark

When = Callable[[Match], bool]
MAX_SWEEPS = 200


@dataclass(frozen=True)
class Rule:
    """`before` ends in the statement that is replaced by `after`: statements, or names of matched values.

    Values made inside `before` have no other use, unless `after` only names values: then nothing is computed twice.
    """

    name: str
    before: Pattern
    after: tuple[Stmt, ...]
    results: tuple[str, ...]
    when: When | None = None

    @staticmethod
    def of(name: str, before: str, after: str, when: When | None = None) -> Rule:
        pattern = Pattern.of(before)
        names = tuple(n.strip() for n in after.split(","))
        if all(n.isidentifier() for n in names):
            rule = Rule(name, pattern, (), names, when)
        else:
            made = parse_statements(after)
            rule = Rule(name, pattern, made, made[-1].targets, when)
        _check(rule)
        return rule

    def match(self, node: Node, makers: dict[Value, Node], uses: Counter[Value]) -> Match | None:
        """The first way in which the rule fires at this node."""
        for found in self.before.find(node, makers):
            if (not self.after or _private(self, found, uses)) and (self.when is None or self.when(found)):
                return found
        return None


def _check(rule: Rule) -> None:
    """Refuse a rule that names what it does not match."""
    root = rule.before.statements[-1]
    known = {n for s in rule.before.statements for n in (*s.targets, *s.args, *map(str, s.named.values()))} - {*root.targets}
    for s in rule.after:
        if s.callee not in OPS and [b.callee for b in rule.before.statements].count(s.callee) != 1:
            raise ParseError(f"rule {rule.name}: {s.callee} must be an op, or a class that stands in `before` once")
        if stray := [n for n in (*s.args, *(str(v) for v in s.named.values())) if n not in known]:
            raise ParseError(f"rule {rule.name}: {stray[0]} stands in `after` and is not matched by `before`")
        known.update(s.targets)
    if stray := [n for n in rule.results if n not in known]:
        raise ParseError(f"rule {rule.name}: {stray[0]} is returned by `after` and is not matched by `before`")
    if len(rule.results) != len(root.targets):
        raise ParseError(f"rule {rule.name}: `before` gives {len(root.targets)} values, `after` {len(rule.results)}")


def _private(rule: Rule, found: Match, uses: Counter[Value]) -> bool:
    """No value made inside the match is read outside it."""
    inner = [v for i, n in found.nodes.items() if i != len(rule.before.statements) - 1 for v in n.outputs]
    reads = Counter(v for n in found.members for v in n.operands)
    return all(uses[v] == reads[v] for v in inner)


def rewrite(graph: Graph, rules: Sequence[Rule]) -> tuple[Graph, tuple[Remark, ...]]:
    """Apply rules until none fires; a sweep goes through the graph once and sees what it has already rewritten."""
    remarks = list[Remark]()
    for _ in range(MAX_SWEEPS):
        sweep = _Sweep(graph, rules)
        graph = sweep.run()
        if not sweep.remarks:
            return graph, tuple(remarks)
        remarks += sweep.remarks
    raise PassError(f"rules {', '.join(r.name for r in rules)} still fire after {MAX_SWEEPS} sweeps; one undoes another")


class _Sweep:
    """One pass over a graph: nodes are emitted in order, and each is the root of a match at once.

    `uses` counts reads of new values by nodes emitted, nodes still to come, and results; a node left without is dropped.
    """

    def __init__(self, graph: Graph, rules: Sequence[Rule]) -> None:
        self.graph, self.replay = graph, Replay(graph)
        self.by_op = defaultdict[str, list[Rule]](list)
        for rule in rules:
            for name in rule.before.root_ops:
                self.by_op[name].append(rule)
        self.pending = Counter(v for n in graph.nodes for v in n.operands) + Counter(graph.outputs)
        self.uses, self.makers, self.dead = Counter[Value](), dict[Value, Node](), set[Node]()
        for old in (*graph.inputs, *graph.params):
            self.uses[self.replay.env[old]] = self.pending[old]
        self.remarks = list[Remark]()

    def run(self) -> Graph:
        made = self.replay.run(self._visit)
        if not self.dead:
            return made
        nodes = tuple(n for n in made.nodes if n not in self.dead)
        return Graph(made.name, made.inputs, made.params, made.inits, nodes, made.outputs, made.role)

    def _visit(self, node: Node, inputs: list[Value | None]) -> Sequence[Value]:
        values = self.replay.keep(node)
        new = self.replay.builder.nodes[-1]
        self.makers.update((v, new) for v in values)
        for old, value in zip(node.outputs, values, strict=True):
            self.uses[value] = self.pending[old]
        for rule in self.by_op[new.op.name] if isinstance(new.op, OpDef) else ():
            if (found := rule.match(new, self.makers, self.uses)) is not None:
                self.remarks.append(Remark("passed", rule.name, new.loc))
                return self._replace(rule, new, found)
        return values

    def _replace(self, rule: Rule, root: Node, found: Match) -> Sequence[Value]:
        env = {**found.values}
        for s in rule.after:
            env.update(zip(s.targets, self._emit(rule, s, env, found, root), strict=True))
        outs = [env[n] for n in rule.results]
        if [v.type for v in outs] != [v.type for v in root.outputs]:
            changed = f"{_types(root.outputs)} into {_types(outs)}"
            raise PassError(f"rule {rule.name} turns {changed} (at {root.loc}); a rule keeps types")
        for was, now in zip(root.outputs, outs, strict=True):
            self.uses[now] += self.uses[was]
            self.uses[was] = 0
        self._bury(root)
        return outs

    def _emit(self, rule: Rule, s: Stmt, env: dict[str, Value], found: Match, root: Node) -> Sequence[Value]:
        """One statement of `after`."""
        op, attrs = _meaning(rule, s, found)
        named = {k: env[str(v)] for k, v in s.named.items()}
        names = [o.name for o in root.outputs] if s is rule.after[-1] else s.targets
        self.replay.builder.emit(op, op.arrange([env[a] for a in s.args], named), attrs, names, root.loc)
        node = self.replay.builder.nodes[-1]
        self.makers.update((v, node) for v in node.outputs)
        self.uses.update(node.operands)
        return node.outputs

    def _bury(self, node: Node) -> None:
        """Drop a node that nothing reads, and then its operands' makers."""
        waiting = [node]
        while waiting:
            dead = waiting.pop()
            if dead in self.dead or dead.callee is not None or any(self.uses[v] for v in dead.outputs):
                continue  # a call of a layer holds parameters
            self.dead.add(dead)
            self.uses.subtract(dead.operands)
            waiting += [self.makers[v] for v in dead.operands if v in self.makers]


def _meaning(rule: Rule, s: Stmt, found: Match) -> tuple[OpDef, dict[str, Any]]:
    """Op and attributes of a statement; a class stands for the op that was matched, with its attributes."""
    attrs = {k: found.attrs[v.name] if isinstance(v, Var) else v for k, v in s.attrs.items()}
    if s.callee not in CLASSES:
        return OPS[s.callee], attrs
    index = next(i for i, b in enumerate(rule.before.statements) if b.callee == s.callee)
    node = found.nodes[index]
    assert isinstance(node.op, OpDef)
    return node.op, {**node.attrs, **attrs}


def _types(values: Sequence[Value]) -> str:
    return ", ".join(str(v.type) for v in values)
