"""Problems: everything wrong with a spec, field by field, as one error."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..ir.errors import SpecError

MAX_PROBLEMS = 40
PLAIN = re.compile(r"[\w.*+-]{1,60}")


def shown(value: object) -> str:
    """A value as an error may quote it: short, and never failing."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    try:
        return short.repr(value)
    except (ValueError, RecursionError):
        return f"too large to print ({type(value).__name__})"


def join(*parts: object) -> str:
    """A dotted path such as `attention.rope.theta`."""
    return ".".join(str(p) if PLAIN.fullmatch(str(p)) else shown(p) for p in parts if p != "")


def suggest(word: object, known: Iterable[str]) -> str:
    """A did-you-mean and the words allowed here."""
    names = list(known)
    close = get_close_matches(str(word)[:60], names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


def refuse(problems: Sequence[str], subject: str = "spec") -> None:
    """Raise one SpecError listing every problem, if there is any."""
    if not problems:
        return
    if len(problems) == 1:
        raise SpecError(f"{subject}: {problems[0]}")
    lines = [line.replace("\n", "\n    ") for line in problems[:MAX_PROBLEMS]]
    lines += [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    raise SpecError("\n  ".join([f"{subject} has {len(problems)} problems:", *lines]))


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "", extra: Sequence[str] = ()) -> list[str]:
    """Pydantic's findings as lines `path: what it is; what it must be`."""
    details = error.errors(include_url=False)[: MAX_PROBLEMS + 1]
    return [line for detail in details for line in _lines(detail, model, prefix, extra)]


def _lines(detail: ErrorDetails, model: type[BaseModel], prefix: str, extra: Sequence[str]) -> Iterator[str]:
    loc = detail["loc"]
    path = join(prefix, *loc)
    owner = _owner(model, loc[:-1])
    fields = owner.model_fields if owner else {}
    field = fields.get(str(loc[-1])) if loc else None
    about = f" ({field.description})" if field and field.description else ""
    match detail["type"]:
        case "value_error":
            # Our own rules name the field and may find several things.
            for line in str(detail.get("ctx", {}).get("error")).split("\n"):
                yield f"{path}.{line}" if path else line
        case "missing":
            yield f"{path}: missing{about}"
        case "extra_forbidden":
            known = [*fields, *(extra if owner is model else ())]
            yield f"{path}: unknown field; {suggest(loc[-1], known)}"
        case "union_tag_invalid" | "union_tag_not_found":
            yield f"{path}.kind: {kind_problem(detail['input'], _kinds(model))}"
        case _:
            yield f"{path}: is {shown(detail['input'])}; {_must(detail['msg'])}{about}"


def kind_problem(table: object, known: Iterable[str]) -> str:
    """Why a table has no usable kind."""
    if not isinstance(table, dict):
        return f"is {shown(table)}; must be a table with a kind; {suggest('', known)}"
    fields: dict[Any, Any] = table
    if "kind" not in fields:
        return f"missing; {suggest('', known)}"
    return f"is {shown(fields['kind'])}; {suggest(fields['kind'], known)}"


def _must(message: str) -> str:
    return re.sub(r"^(Input|\w+) should ", "must ", message)


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """Every model class that a field's annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _kinds(model: type[BaseModel]) -> list[str]:
    found = (m for f in model.model_fields.values() for m in _models(f.annotation))
    return [m.model_fields["kind"].default for m in found if "kind" in m.model_fields]


def _owner(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    """The model class whose field a location ends in."""
    choices = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        fields = [c.model_fields[part] for c in choices if part in c.model_fields]
        tagged = [c for c in choices if "kind" in c.model_fields and c.model_fields["kind"].default == part]
        choices = tagged or [m for f in fields for m in _models(f.annotation)]
    return choices[0] if len(choices) == 1 else None
