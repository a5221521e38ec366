"""A training run on disk: a folder whose last whole checkpoint survives a kill at any moment.

run/latest              the name of the checkpoint that counts, replaced last and in one step
run/step-00000200/      model.safetensors, optimizer.safetensors, state.json with the digests of both
run/history.jsonl       one line per measurement, for people and plots
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..ir import CheckpointError
from ..ir.files import write_text
from .checkpoint import read_tensors, save_tensors

Tensors = Mapping[str, torch.Tensor]
FORMAT = "plait-run-1"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Point:
    """What was measured at one step; `loss` is the mean over the steps since the point before, None at the start."""

    step: int
    seconds: float
    loss: float | None
    valid: float


@dataclass(frozen=True)
class Moment:
    """Where a run stands: with the tensors, all that it takes to continue."""

    step: int = 0
    seconds: float = 0.0
    points: tuple[Point, ...] = ()
    losses: tuple[float, ...] = ()  # of the steps since the last point


@dataclass(frozen=True)
class Facts:
    """What a checkpoint must share with the run that continues it."""

    spec: str
    dtype: str
    text: str  # digest of the training and validation bytes


def fresh_run(run: Path) -> None:
    """Make the folder of a new run; one that holds a run already is refused."""
    if run.exists() and not run.is_dir():
        raise CheckpointError(f"{run}: is no folder; give a folder for the checkpoints")
    if (run / "latest").exists():
        raise CheckpointError(f"{run}: already holds a run; resume it, or give another folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{run}: cannot be made: {error.strerror or error}") from None


def save_run(run: Path, model: Tensors, optimizer: Tensors, moment: Moment, facts: Facts, options: Mapping[str, Any]) -> None:
    """Write a checkpoint beside the last one, make it the one that counts, and only then remove the older ones."""
    folder = run / f"step-{moment.step:08d}"
    save_tensors(folder / MODEL, model, {"format": "plait", "spec": facts.spec})
    save_tensors(folder / OPTIMIZER, optimizer, {"format": FORMAT})
    state = {
        "format": FORMAT, **asdict(facts), "step": moment.step, "seconds": moment.seconds, "losses": moment.losses,
        "options": dict(options), "digests": {name: digest(folder / name) for name in (MODEL, OPTIMIZER)},
        "points": [asdict(p) for p in moment.points],
    }  # fmt: skip
    write_text(folder / STATE, json.dumps(state, indent=1) + "\n")
    write_text(run / "history.jsonl", "".join(json.dumps(asdict(p)) + "\n" for p in moment.points))
    write_text(run / "latest", folder.name + "\n")
    for old in run.glob("step-*"):
        if old.name != folder.name:
            shutil.rmtree(old, ignore_errors=True)


def clear_run(run: Path) -> None:
    """Remove a run's own files, and nothing else, from its folder."""
    for name in ("latest", "history.jsonl"):
        (run / name).unlink(missing_ok=True)
    for old in run.glob("step-*"):
        shutil.rmtree(old, ignore_errors=True)


def load_run(run: Path, facts: Facts, model: Tensors, optimizer: Tensors) -> Moment:
    """Fill both sets of tensors from the last checkpoint; nothing is written into them unless everything fits."""
    folder = latest(run)
    state = read_state(folder)
    _check_facts(run, state, facts)
    for name in (MODEL, OPTIMIZER):
        if digest(folder / name) != state["digests"].get(name):
            raise CheckpointError(f"{folder / name}: is damaged, its digest is not the one in {STATE}; start anew")
    moment = _moment(folder, state)
    found = [(read_tensors(folder / name, own).tensors, own) for name, own in ((MODEL, model), (OPTIMIZER, optimizer))]
    with torch.no_grad():
        for tensors, own in found:
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
    return moment


def checkpoint_file(path: str | Path) -> Path:
    """The weights that a path means: a file itself, or the last checkpoint of a run's folder."""
    path = Path(path)
    return latest(path) / MODEL if path.is_dir() else path


def stored_options(run: Path) -> Mapping[str, Any]:
    """The options that a run was last trained with."""
    return read_state(latest(run))["options"]


def latest(run: Path) -> Path:
    """The folder of the last whole checkpoint."""
    try:
        name = (run / "latest").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise CheckpointError(f"{run}: holds no checkpoint to continue from; train without resuming first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{run / 'latest'}: cannot be read: {error}") from None
    if not re.fullmatch(r"step-\d{8,12}", name):
        raise CheckpointError(f"{run / 'latest'}: is {name[:40]!r}, must be the name of a checkpoint such as step-00000200")
    return run / name


def read_state(folder: Path) -> dict[str, Any]:
    """The fields of state.json, each of its own kind."""
    path = folder / STATE
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file, though the run's `latest` names it; start anew") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error)[:200]}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: is no JSON object; it was not written by plait")
    found = cast("dict[str, Any]", state)
    for name, kinds in _FIELDS.items():
        if not isinstance(found.get(name), kinds) or isinstance(found[name], bool):
            shown = str(found.get(name))[:40]
            raise CheckpointError(f"{path}: {name} is {shown!r}; the file was not written by plait, or is damaged")
    if found["format"] != FORMAT or folder.name != f"step-{found['step']:08d}":
        is_now = f"{found['format']!r} at step {found['step']}"
        raise CheckpointError(f"{path}: is {is_now}, must be {FORMAT!r} at the step of its folder")
    return found


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": str, "spec": str, "dtype": str, "text": str, "step": int, "seconds": (int, float), "losses": list, "points": list,
    "options": dict, "digests": dict,
}  # fmt: skip


def _moment(folder: Path, state: dict[str, Any]) -> Moment:
    try:
        points = tuple(Point(**p) for p in cast("Sequence[dict[str, Any]]", state["points"]))
        numbers = [float(x) for x in state["losses"]]
        sound = all(math.isfinite(x) for p in points for x in (p.step, p.seconds, p.valid, p.loss or 0.0))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: its points do not read: {error}") from None
    if not sound:
        raise CheckpointError(f"{folder / STATE}: its points hold a number that is not finite")
    return Moment(state["step"], float(state["seconds"]), points, tuple(numbers))


def _check_facts(run: Path, state: Mapping[str, Any], facts: Facts) -> None:
    """Refuse to continue a run as another one."""
    if state["spec"] != facts.spec:
        change = _first_change(state["spec"], facts.spec)
        raise CheckpointError(f"{run}: is a run of another spec{change}; use its spec or another folder")
    if state["dtype"] != facts.dtype:
        raise CheckpointError(f"{run}: is a run in {state['dtype']}, the model is in {facts.dtype}; compile it alike")
    if state["text"] != facts.text:
        raise CheckpointError(f"{run}: is a run on other text; give the same text, or another folder to start anew")


def _first_change(ours: str, theirs: str) -> str:
    pairs = zip(ours.splitlines(), theirs.splitlines(), strict=False)
    return next((f": it has `{a[:60]}`, the model `{b[:60]}`" for a, b in pairs if a != b), "")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
