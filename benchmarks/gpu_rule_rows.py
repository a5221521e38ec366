"""Rows of the GPU table that are recurrences: held against float64, then timed beside their peers."""

from __future__ import annotations

from typing import Any

from gpu_measure import Clock, error, reason, time_all, wrong
from gpu_rules import CHECKED, Function, Rule, call_of, functions, operands, rule_bytes, truth

DEFAULT_TOKENS = 8192  # of the table, where rules have tokens of their own
UNLIKE = "mamba-ssm"  # which is given other decays, and so has other results


def measure_rule(rule: Rule, tokens: int, samples: int, clock: Clock, device: str, record: dict[str, Any]) -> None:
    """Checked at few tokens, timed at the rule's own; fewer where the table is asked for fewer."""
    tokens = rule.tokens if tokens == DEFAULT_TOKENS else min(rule.tokens, tokens)
    record |= {"bytes": rule_bytes(rule, tokens), "target": rule.target, "tokens": tokens, "checked": min(tokens, CHECKED)}
    found, failures = dict[str, Function](), record["failures"]
    errors, xs = dict[str, tuple[float, float]](), operands(rule, record["checked"], device)
    want = truth(rule, xs)
    for name, make in functions(rule, device).items():
        try:
            found[name] = make()
            errors[name] = error(call_of(rule, found[name], xs)()(), want)
        except Exception as failed:  # not installed, or whatever a compiler or a launch may raise: the others go on
            failures[name] = reason(failed)
    failures |= {name: why for name, each in errors.items() if name != UNLIKE and (why := wrong(each))}
    xs = operands(rule, tokens, device)
    setups = {name: call_of(rule, found[name], xs) for name in errors if name not in failures}
    time_all(setups, errors, samples, clock, record)
