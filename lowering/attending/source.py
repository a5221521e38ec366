"""Triton source of an attention: skeletons filled with its parts, and the arguments that each function then names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from ..recurrent.source import Function, Source, filled
from .backward_text import KEYS, QUERIES, VALUES
from .forward_text import ATTEND, INSIDE, JOIN, SPANS, SPLIT
from .parts import parts, walked
from .traits import Traits

CONSTANTS = ("H", "R", "D", "E", "BD", "BE", "BM", "BN", "C", "PRECISION", "K", "BT", "BC", "BK")
COUNTS = ("t", "s", "n", "window", "splits", "rows", "parts")
FACTORS = ("rise", "bend", "scale")
BACKWARD = {"queries": QUERIES, "keys": KEYS, "values": VALUES}
LIBRARY = {"inside": INSIDE, "spans": SPANS}


@cache
def forward_source(traits: Traits) -> Source:
    """`attend`."""
    return made("attention", traits.name, {"attend": (ATTEND, walked(traits, "attend"))})


@cache
def backward_source(traits: Traits) -> Source:
    """`queries`, `keys` and `values`."""
    skeletons = {name: (text, walked(traits, name)) for name, text in BACKWARD.items()}
    return made("attention_backward", traits.name, skeletons)


@cache
def decode_source(traits: Traits) -> Source:
    """`split` and `join`."""
    found = parts(traits)
    return made("attention_decode", traits.name, {"split": (SPLIT, found), "join": (JOIN, found)})


def made(what: str, name: str, skeletons: Mapping[str, tuple[str, Mapping[str, str]]]) -> Source:
    """A module of these functions and of what they call."""
    texts, functions = list[str](), dict[str, Function]()
    for key, (skeleton, found) in skeletons.items():
        text, function = _function(f"{key}_{name}", skeleton, found)
        texts.append(text)
        functions[key] = function
    body = "\n\n\n".join(texts)
    library = [text for call, text in LIBRARY.items() if f"{call}(" in body]
    head = f'"""{what.replace("_", " ").capitalize()}, made by plait: {name.replace("_", " ")}."""\n\n'
    head += "import triton\nimport triton.language as tl"
    head += "\nfrom triton.language.extra import libdevice" if "libdevice." in body else ""
    return Source(f"{what}_{name}", "\n\n\n".join([head, *(x.strip("\n") for x in library), body]) + "\n", functions)


def _function(name: str, skeleton: str, found: Mapping[str, str]) -> tuple[str, Function]:
    """A skeleton's text, its arguments read off what it uses."""
    body = filled(skeleton, {**found, "name": name, "arguments": "$arguments", "loose": "$loose"})
    used = set(re.findall(r"\b[A-Za-z_]\w*\b", re.sub(r'"""[^"]*"""', "", body)))
    pointers = sorted(x for x in used if x.startswith("p_"))
    batches = sorted(x for x in used if re.fullmatch(r"s_\w+_b", x))
    strides = sorted(x for x in used if re.fullmatch(r"s_\w+_[th]", x))
    counts, factors = ([x for x in names if x in used] for names in (COUNTS, FACTORS))
    constants = [*strides, *(x for x in CONSTANTS if x in used)]
    declared = "\n    " + _rows([*pointers, *batches, *counts, *factors, *(f"{c}: tl.constexpr" for c in constants)]) + "\n"
    loose = ", ".join(f'"{x}"' for x in counts)
    text = body.replace("$arguments", declared).replace("$loose", loose).strip("\n")
    return text, Function(name, (*pointers, *batches, *counts, *factors, *constants))


def _rows(arguments: list[str]) -> str:
    rows = [""]
    for argument in arguments:
        if len(rows[-1]) + len(argument) > 110:
            rows.append("")
        rows[-1] += f"{argument}, "
    return "\n    ".join(row.rstrip() for row in rows)
