"""`plait tune`: launch configurations that are measured on the device at hand, in a file that can be shipped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_compile import Json
from plait.cli_kernels import fused, gpu_targets
from plait.cli_output import Table, fail_cleanly, note, problem, show, write_json

if TYPE_CHECKING:
    from plait.lowering.gpu.tuning import Chosen


def mount(app: typer.Typer) -> None:
    """Add `tune`."""
    app.command("tune")(tune_command)


@fail_cleanly
def tune_command(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC...", help="Presets, .toml, .json or .ir files.")],
    budget: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="After them what is left keeps its default.")
    ] = 60.0,
    gates: Annotated[
        bool, typer.Option("--gates", help="Time nothing: tell what the static gates leave of the space. No GPU needed.")
    ] = False,
    target: Annotated[str, typer.Option(metavar="TARGET", help="Of --gates; else the device that is here.")] = "sm_90",
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Of configurations; PLAIT_TUNED names it when running.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Choose warps and tiles by measurement, within a budget; choices are printed, and kept in a file that can be shipped.

    Keys are what a kernel computes, its head sizes and dtype, and the target: never a length. Nothing tunes while a model runs.
    """
    from plait import tune

    (known,) = gpu_targets([target])
    if not gates:
        known = _here()
    path, made = Path(output) if output else None, list["Chosen"]()
    for chosen in tune.tuned_kernels(
        [fused(name) for name in dict.fromkeys(specs)], known, budget=budget, measured=not gates, say=_say
    ):
        note(chosen.told)
        made.append(chosen)
        if not gates:
            tune.save({chosen.name: chosen.best}, path)  # at once: Ctrl-C loses nothing that was measured
    if as_json:
        write_json({"target": known, "measured": not gates, "keys": [facts(c) for c in made]}, "-")
    else:
        show([table(made)], "-")


def _say(text: str) -> None:
    note(f"plait: note: {text}")


def _here() -> str:
    """The target of the device that is here."""
    import torch
    from plait.lowering.gpu.machine import target_of

    if not torch.cuda.is_available():
        raise problem("configurations are timed on a CUDA device, and there is none here; --gates tells what there is to time")
    return target_of(torch.device("cuda"))


def table(made: list[Chosen]) -> Table:
    """What was chosen, key by key."""
    from plait.lowering.gpu.tuning import described

    columns = ("kernel", "key", "configuration", "timed", "refused", "over the default")
    lines = [(c.work, c.name[1], described(c.best), str(len(c.seconds)), str(len(c.refused)), gain(c)) for c in made]
    return Table(columns, lines, f"{len(made)} keys" if made else "no key that is not in the table already")


def gain(chosen: Chosen) -> str:
    """How many times faster than the default, where both were timed."""
    from plait.lowering.gpu.tuning import described

    base, took = (chosen.seconds.get(described(c)) for c in (chosen.default, chosen.best))
    return f"{base / took:.2f}x" if base and took else "-"


def facts(chosen: Chosen) -> dict[str, Any]:
    """One choice for scripts."""
    from dataclasses import asdict

    return {
        "kernel": chosen.work, "key": chosen.name[1], "default": asdict(chosen.default), "chosen": asdict(chosen.best),
        "seconds": dict(chosen.seconds), "refused": dict(chosen.refused),
    }  # fmt: skip
