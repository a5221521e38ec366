"""Pipelines as text: `fuse{only=norm-gate+glu},dce,outline-rows{max_ops=40}`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

from ..ir import ParseError, PassError
from .registry import PASSES, Option, Pass
from .remarks import suggestion

_NAME = re.compile(r"\s*([A-Za-z][\w-]*)")
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)=('[^']*'|[^\s{},'=]+)")
_BARE = re.compile(r"[^\s{},'=]+")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Stage:
    """A pass and the options that differ from its defaults."""

    made: Pass
    given: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = " ".join(f"{name}={show_value(value)}" for name, value in self.given)
        return f"{self.made.name}{{{options}}}" if options else self.made.name


def show_value(value: Any) -> str:
    """An option's value as pipeline text has it."""
    match value:
        case bool():
            return "true" if value else "false"
        case tuple():
            return "+".join(value)
        case str():
            return value if _BARE.fullmatch(value) else f"'{value}'"
        case _:
            return repr(value)


@dataclass(frozen=True)
class _Text:
    """Pipeline text being read, to point into."""

    text: str

    def fail(self, kind: type[ParseError | PassError], why: str, at: int) -> NoReturn:
        start = max(0, at - 90)
        raise kind(f"pipeline: {why}\n  {self.text[start : start + 110]}\n  {' ' * (at - start)}^")

    def skip(self, at: int) -> int:
        while at < len(self.text) and self.text[at].isspace():
            at += 1
        return at

    def at_char(self, at: int, char: str) -> bool:
        return self.text[at : at + 1] == char


def parse_stages(text: str) -> tuple[Stage, ...]:
    """The stages of pipeline text; every mistake is pointed at."""
    source, stages, at = _Text(text), list[Stage](), 0
    if not text.strip():
        return ()
    while True:
        stage, at = _stage(source, at)
        stages.append(stage)
        at = source.skip(at)
        if at == len(text):
            return tuple(stages)
        if not source.at_char(at, ","):
            source.fail(ParseError, "expected `,` between passes, or `{option=value}` right after one", at)
        at += 1


def _stage(source: _Text, at: int) -> tuple[Stage, int]:
    found = _NAME.match(source.text, at)
    if not found:
        source.fail(ParseError, "expected the name of a pass", source.skip(at))
    name, start = found[1], found.start(1)
    if name not in PASSES:
        source.fail(PassError, f"no pass called {name}; {suggestion(name, PASSES)}", start)
    made, at = PASSES[name], found.end()
    if not source.at_char(at, "{"):
        return Stage(made), at
    given, at = _options(source, made, at + 1)
    ordered = ((o.name, given[o.name]) for o in made.options if o.name in given and given[o.name] != o.default)
    return Stage(made, tuple(ordered)), at


def _options(source: _Text, made: Pass, at: int) -> tuple[dict[str, Any], int]:
    """What stands between braces, and where it ends."""
    given = dict[str, Any]()
    options = {o.name: o for o in made.options}
    while not source.at_char(at := source.skip(at), "}"):
        found = _OPTION.match(source.text, at)
        if not found:
            source.fail(ParseError, f"expected `option=value`, parted by spaces, or a closing brace, in {made.name}{{...}}", at)
        name = found[1]
        if name not in options:
            source.fail(PassError, f"{made.name} has no option {name}; {suggestion(name, options)}", found.start(1))
        if name in given:
            source.fail(PassError, f"{made.name}: option {name} is given twice; give it once", found.start(1))
        given[name] = _value(source, made, options[name], found)
        at = found.end()
    return given, at + 1


def _value(source: _Text, made: Pass, option: Option, found: re.Match[str]) -> Any:
    text = found[2].strip("'")
    try:
        value = read_value(option.kind, text)
    except ValueError:
        wanted = {"tuple[str, ...]": "names joined by +", "bool": "true or false"}.get(option.kind, option.kind)
        source.fail(PassError, f"{made.name}: option {option.name} is {text!r}, must be {wanted}", found.start(2))
    for part in value if isinstance(value, tuple) else (value,):
        if option.choices and part not in option.choices:
            why = f"{made.name}: option {option.name} cannot be {part!r}; {suggestion(str(part), option.choices)}"
            source.fail(PassError, why, found.start(2))
    return value


def read_value(kind: str, text: str) -> Any:
    """Text as a value of an option's type; ValueError when it is none."""
    match kind:
        case "int":
            return int(text)
        case "float":
            return float(text)
        case "bool" if text in _TRUTH:
            return _TRUTH[text]
        case "bool":
            raise ValueError(text)
        case "tuple[str, ...]":
            return tuple(x for x in text.split("+") if x)
        case _:
            return text
