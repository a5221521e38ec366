"""Weights on disk: safetensors, written whole or not at all, and read only if every tensor fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..ir import CheckpointError
from ..ir.files import write_atomic

SHOWN = 8  # names listed of each kind of misfit


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors by name, and text by key."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]


def save_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file. Raises PlaitError when it cannot be written; then nothing has changed on disk."""
    whole = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    write_atomic(path, lambda beside: save_file(whole, str(beside), dict(metadata)))


def read_metadata(path: Path | str) -> dict[str, str]:
    """The text of a file, its tensors left alone."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_tensors(path: Path | str, expected: Mapping[str, torch.Tensor]) -> Checkpoint:
    """The tensors of a file that must fit `expected` by name and shape. Raises CheckpointError listing every misfit."""
    with _opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
        if problems := misfits(shapes, {k: tuple(v.shape) for k, v in expected.items()}):
            raise CheckpointError(f"{path}: its tensors do not fit the model\n" + "\n".join(f"  {p}" for p in problems))
        try:
            return Checkpoint({name: file.get_tensor(name) for name in shapes}, dict(file.metadata() or {}))
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _opened(path: Path | str):
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is not a safetensors file, or only a part of one: {error}") from None


def misfits(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every way in which names and shapes differ from the expected ones, one line a kind."""
    missing = [k for k in expected if k not in found]
    extra = [k for k in found if k not in expected]
    apart = [k for k in expected if k in found and found[k] != expected[k]]
    wrong = [f"{k} is {list(found[k])}, must be {list(expected[k])}" for k in apart]
    kinds = (("missing", missing), ("not in the model", extra), ("of another shape", wrong))
    return [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]


def _some(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
