"""What there is: ops, passes and presets, each explained from its own definition."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_output import Table, count, fail_cleanly, problem, show, suggestion, write_json, write_out

if TYPE_CHECKING:
    from plait.ir import OpDef
    from plait.passes import Pass

INDENT = 14  # of what is said of an op, after its label
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


def mount(app: typer.Typer) -> None:
    """Add `ops`, `op`, `passes` and `presets`."""
    app.command("ops")(ops)
    app.command("op")(op)
    app.command("passes")(passes)
    app.command("presets")(presets)


@fail_cleanly
def ops(as_json: Json = False) -> None:
    """List every op, with its meaning and signature."""
    from plait.ir import OPS

    if as_json:
        return write_json({"ops": [op_facts(o) for o in OPS.values()]})
    rows = [(o.name, _traits(o), _first_line(o.__doc__), signature(o)) for o in OPS.values()]
    show([Table(("op", "traits", "meaning", "signature"), rows)])


@fail_cleanly
def op(name: Annotated[str, typer.Argument(help="As `plait ops` lists it.")], as_json: Json = False) -> None:
    """Explain one op, and what runs it on each target."""
    from plait.ir import OPS

    if name not in OPS:
        raise problem(f"no op called {name}; {suggestion(name, OPS)}")
    facts = op_facts(OPS[name])
    if as_json:
        return write_json(facts)
    write_out(_page(facts))


def signature(made: OpDef) -> str:
    return f"{', '.join(map(str, made.inputs))} -> {', '.join(map(str, made.outputs))}"


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def _traits(made: OpDef) -> str:
    """What passes may rely on."""
    claims = {"row": made.row, "commutes": made.commutes, "linear": made.linear, "collective": made.rank_rule}
    return " ".join(name for name, holds in claims.items() if holds)


def op_facts(made: OpDef) -> dict[str, Any]:
    """All that is known of an op."""
    from plait.lowering import TARGETS, targets_of

    forms = targets_of(made)
    return {
        "name": made.name,
        "signature": signature(made),
        "meaning": inspect.cleandoc(made.__doc__ or ""),
        "defined": place(made.reference),
        "roles": dict(made.roles),
        "traits": _traits(made).split(),
        "linear": [sorted(group) for group in made.linear],
        "attributes": [_attribute(made, name) for name in made.attrs],
        "flops": made.flops_text,
        "gradient": gradient(made),
        "lowerings": {t: _lowering(made, forms.get(t)) for t in TARGETS} | _row_form(made),
    }


def gradient(made: OpDef) -> str:
    """The equations of its cotangents, where they are written, or why there are none."""
    if made.vjp_rule is None:
        return f"none: {made.constant}"
    if isinstance(made.vjp_rule, str):
        return inspect.cleandoc(made.vjp_rule) or "0: it is constant between its steps"
    return f"equations whose number types decide, at {place(made.vjp_rule)}"


def _attribute(made: OpDef, name: str) -> dict[str, Any]:
    from plait.ir import REQUIRED

    kind = str(inspect.signature(made.reference).parameters[name].annotation)
    default = made.attrs[name]
    return {"name": name, "type": kind, "required": default is REQUIRED, "default": None if default is REQUIRED else default}


def _lowering(made: OpDef, form: Any) -> dict[str, str]:
    if form is None:
        return {"runs": "reference", "why": "fused with its neighbours by torch.compile", "defined": place(made.reference)}
    return {"runs": "form", "why": form.reason, "defined": place(form.run)}


def _row_form(made: OpDef) -> dict[str, dict[str, str]]:
    """How the op is part of generated kernels, where it can be."""
    from plait.lowering.rows import row_form

    if (form := row_form(made.name)) is None:
        return {}
    return {"kernels": {"runs": "row form", "why": "in Triton kernels of fused regions", "defined": place(form)}}


def place(fn: Callable[..., Any]) -> str:
    """`plait/ir/ops/norm.py:15`, or the module where Python has no file for it."""
    target = inspect.unwrap(fn)
    try:
        file, line = inspect.getsourcefile(target), inspect.getsourcelines(target)[1]
    except (TypeError, OSError):
        return getattr(fn, "__module__", "")
    path, home = Path(file or ""), Path(__file__).parent
    return f"plait/{path.relative_to(home).as_posix()}:{line}" if path.is_relative_to(home) else f"{path.name}:{line}"


def _page(facts: dict[str, Any]) -> str:
    roles = ", ".join(f"{letter}: {role}" for letter, role in facts["roles"].items())
    linear = "; ".join(f"in {', '.join(group)}" + (" together" if len(group) > 1 else "") for group in facts["linear"])
    attributes = [f"{a['name']}: {a['type']}" + ("" if a["required"] else f" = {a['default']!r}") for a in facts["attributes"]]
    lines = {
        "signature": facts["signature"],
        "meaning": facts["meaning"].replace("\n", "\n" + " " * INDENT),
        "defined": facts["defined"],
        "roles": roles or "none",
        "traits": ", ".join(facts["traits"]) or "none",
        "linear": linear or "no",
        "attributes": ("\n" + " " * INDENT).join(attributes) or "none",
        "flops": facts["flops"],
        "gradient": facts["gradient"].replace("\n", "\n" + " " * INDENT),
    }
    lowerings = [f"  {target}: {x['runs']} at {x['defined']}, {x['why']}" for target, x in facts["lowerings"].items()]
    return "\n".join([facts["name"], *(f"  {k:<{INDENT - 2}}{v}" for k, v in lines.items()), "lowerings", *lowerings]) + "\n"


@fail_cleanly
def passes(as_json: Json = False) -> None:
    """List every pass, with its options and numerics."""
    from plait.passes import DEFAULT, PASSES

    if as_json:
        return write_json({"default": DEFAULT, "passes": [_pass_facts(p) for p in PASSES.values()]})
    rows = [(p.name, p.numerics, "model" if p.model else "layer", _options(p), p.about) for p in PASSES.values()]
    show([Table(("pass", "numerics", "sees", "options", "what it is for"), rows), Table(("default pipeline",), [(DEFAULT,)])])


def _options(made: Pass) -> str:
    from plait.passes.pipeline import show_value

    return " ".join(f"{o.name}={show_value(o.default)}" if o.default else o.name for o in made.options) or "-"


def _pass_facts(made: Pass) -> dict[str, Any]:
    options = [{"name": o.name, "type": o.kind, "default": o.default, "choices": o.choices} for o in made.options]
    return {"name": made.name, "numerics": made.numerics, "model": made.model, "options": options, "about": made.about}


@fail_cleanly
def presets(as_json: Json = False) -> None:
    """List the specs that come with plait."""
    from plait.frontends import PRESETS

    facts = [_preset(p.name, p.about) for p in PRESETS]
    if as_json:
        return write_json({"presets": facts})
    rows = [(f["name"], count(f["parameters"]), count(f["active"]), str(f["blocks"]), f["about"]) for f in facts]
    show([Table(("preset", "parameters", "active", "blocks", "what it is"), rows)])


def _preset(name: str, about: str) -> dict[str, Any]:
    from plait.frontends import active_parameter_count, load_spec, parameter_count

    spec = load_spec(name)
    return {
        "name": name,
        "parameters": parameter_count(spec),
        "active": active_parameter_count(spec),
        "blocks": len(spec.blocks),
        "about": about,
    }
