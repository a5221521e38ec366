"""Triton source of a recurrence: skeletons filled with a member's parts, and the arguments that each function then names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .backward_text import BACK, GRADIENTS, PULLS
from .forward_text import DECODE, GATES, INSIDE, INVERT, PREPARE, PRODUCT, READS, SCAN, SOLVED, SPAN
from .parts import parts
from .traits import Traits

CONSTANTS = (
    "H",
    "R",
    "K",
    "V",
    "BK",
    "BV",
    "BW",
    "CHUNK",
    "EARLY",
    "LEVELS",
    "SPLIT",
    "C",
    "L",
    "WIDE",
    "PRECISION",
    "SOLVE",
    "TINY",
)
NUMBERS = ("t", "chunks", "n_rows", "scale")
LIBRARY = {  # what a body calls that is no part of it
    **{"solved": SOLVED, "reads": READS, "invert": INVERT, "span": SPAN, "added": PRODUCT},
}
NAME = re.compile(r"\$(\w+)")


@dataclass(frozen=True)
class Function:
    """One Triton function: its name and its arguments."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A module of Triton functions."""

    name: str
    text: str
    functions: Mapping[str, Function]


@cache
def forward_source(traits: Traits) -> Source:
    """`prepare` and `scan`."""
    kind = "channel" if traits.decay == "channel" else "head"
    gates = {"gates": GATES} if kind == "channel" else {}
    return _source("forward", traits, {**gates, "prepare": PREPARE[kind], "scan": SCAN})


@cache
def backward_source(traits: Traits) -> Source:
    """`back`, `pulls` and `gradients`."""
    return _source("backward", traits, {"back": BACK, "pulls": PULLS, "gradients": GRADIENTS})


@cache
def decode_source(traits: Traits) -> Source:
    """`decode`."""
    return _source("decode", traits, {"decode": DECODE})


def _source(half: str, traits: Traits, skeletons: Mapping[str, str]) -> Source:
    texts, functions = list[str](), dict[str, Function]()
    for name, skeleton in skeletons.items():
        text, function = _function(f"{name}_{traits.name}", skeleton, parts(traits))
        texts.append(text)
        functions[name] = function
    body = "\n\n\n".join(texts)
    library = [INSIDE, *(text for call, text in LIBRARY.items() if f"{call}(" in body)]
    head = f'"""The {half} of a linear recurrence, made by plait: {traits.name.replace("_", " ")}."""\n\n'
    head += "import triton\nimport triton.language as tl"
    return Source(f"{half}_{traits.name}", "\n\n\n".join([head, *(x.strip("\n") for x in library), body]) + "\n", functions)


def _function(name: str, skeleton: str, found: Mapping[str, str]) -> tuple[str, Function]:
    """A skeleton's text, its arguments read off what it uses."""
    body = filled(skeleton, {**found, "name": name, "arguments": "$arguments", "loose": "$loose"})
    used = set(re.findall(r"\b[A-Za-z_]\w*\b", re.sub(r'"""[^"]*"""', "", body)))
    pointers = sorted(x for x in used if x.startswith("p_"))
    strides = sorted(x for x in used if re.fullmatch(r"s_\w+_[th]", x))
    numbers, constants = [x for x in NUMBERS if x in used], [x for x in CONSTANTS if x in used]
    arguments = (*pointers, *strides, *numbers, *constants)
    declared = "\n    " + _rows([*pointers, *numbers, *(f"{c}: tl.constexpr" for c in (*strides, *constants))]) + "\n"
    loose = ", ".join(f'"{x}"' for x in numbers if x != "scale")
    return body.replace("$arguments", declared).replace("$loose", loose).strip("\n"), Function(name, arguments)


def _rows(arguments: list[str]) -> str:
    rows = [""]
    for argument in arguments:
        if len(rows[-1]) + len(argument) > 110:
            rows.append("")
        rows[-1] += f"{argument}, "
    return "\n    ".join(row.rstrip() for row in rows)


def filled(skeleton: str, found: Mapping[str, str]) -> str:
    """A skeleton with its parts: one that stands alone on a line is so many lines, or none."""
    out = list[str]()
    for line in skeleton.split("\n"):
        bare = line.strip()
        if alone := NAME.fullmatch(bare):
            text = filled(found[alone[1]], found).strip("\n")
            indent = line[: len(line) - len(bare)]
            out += [indent + x for x in text.split("\n")] if text else []
        else:
            out.append(NAME.sub(lambda m: found[m[1]] if m[1] in ("arguments", "loose") else filled(found[m[1]], found), line))
    return "\n".join(out)
