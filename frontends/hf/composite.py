"""Models of several parts: the text model is read, and what belongs to others is named and left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...ir.errors import SpecError
from ..problems import shown
from .config import Config
from .plan import Plan

TEXT = "text_config"
# Of the prefixes that files give the text model, the one that a file of it alone has.
ALONE = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))
OTHERS = (r"(model\.)?(visual|vision_tower|vision_model|multi_modal_projector)\..*",)


def text_part(
    c: Config, family: Callable[[Config], Plan], others: tuple[str, ...], usual: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of a composite config's text model.

    `others` are the fields that speak of other parts, `usual` what published configs leave out of the text model's.
    """
    fields = {**(usual or {}), **text_fields(c.fields, family.__name__)}
    if c.get("tie_word_embeddings", fields.get("tie_word_embeddings")) != fields.get("tie_word_embeddings"):
        c.problems.append("tie_word_embeddings: is not what text_config says")
    c.idle(TEXT, "tie_word_embeddings", "dtype", "torch_dtype", *others)
    c.notes.append("of its parts only the text model is read; a folder that is written holds that alone")
    c.finish()
    plan = family(Config(fields))
    return replace(plan, renamed=ALONE, derived=(*plan.derived, *OTHERS), config=fields)


def text_fields(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The config of the text model alone."""
    inner: Any = config.get(TEXT)
    if not isinstance(inner, dict):
        raise SpecError(f"config.json: {TEXT}: is {shown(inner)}; must be a table, the text model's config")
    outside = {n: config[n] for n in ("dtype", "torch_dtype", "tie_word_embeddings") if config.get(n) is not None}
    return {**outside, **inner, "model_type": family}
