"""Weights back to a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...ir.errors import CheckpointError
from .config import DTYPES
from .families import read_plan
from .folder import CONFIG, INDEX, SINGLE, inside
from .load import full_name
from .plan import map_of
from .text import BESIDE

Tensor = torch.Tensor
SHARD = 5 * 10**9  # bytes of one file


def hf_tensors(
    config: Mapping[str, Any], parameters: Mapping[str, Tensor], names: Iterable[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters, or their gradients, one after another under the names and in the shapes of the family's files.

    Where files of a family differ, `names` are those of the file that is meant.
    """
    plan, wanted = read_plan(config), tuple(names)
    own = {full_name(name, plan, wanted): name for name in wanted}
    for rule in map_of(plan, own):
        if rule.target in parameters:
            for name, tensor in rule.take_apart(parameters[rule.target]).items():
                yield own.get(name, name), tensor


def hf_names(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Which tensors of the family's files make up each parameter, in order."""
    return {rule.target: tuple(part.name for part in rule.parts) for rule in map_of(read_plan(config))}


def write_folder(
    folder: Path, config: Mapping[str, Any], parameters: Mapping[str, Tensor], shard: int = SHARD, like: Path | None = None
) -> None:
    """config.json and safetensors in a new folder, and what the folder `like` has of a tokenizer.

    Raises CheckpointError where something is already, or writing fails.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise CheckpointError(f"{folder}: is there already; a model is written to a new or an empty folder")
    config = read_plan(config).config or config
    wanted = set(hf_names(config))
    if wanted != set(parameters):
        apart = sorted(wanted ^ set(parameters))[:8]
        raise CheckpointError(f"{folder}: the model and its config differ in the parameters {', '.join(apart)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        _write(beside, config, parameters, shard)
        _copy(like, beside)
        beside.chmod(0o755)
        beside.replace(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {getattr(error, 'strerror', '') or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _copy(like: Path | None, folder: Path) -> None:
    """What stands beside the weights there, a tokenizer's files, stands beside them here."""
    for name in BESIDE if like is not None else ():
        if like is not None and (like / name).exists():
            shutil.copyfile(inside(like, name), folder / name)


def _write(folder: Path, config: Mapping[str, Any], parameters: Mapping[str, Tensor], shard: int) -> None:
    dtype = next(name for name, short in DTYPES.items() if getattr(torch, name) == parameters["embed"].dtype and short)
    said = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    (folder / CONFIG).write_text(json.dumps({**said, key: dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    files: list[list[str]] = []
    for part in _shards(hf_tensors(config, parameters), shard):
        save_file(part, folder / f"part-{len(files)}", {"format": "pt"})
        files.append([*part])
    if len(files) == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return
    places: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    total = sum(t.numel() * t.element_size() for t in parameters.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterator[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors by the file, each file at most so many bytes unless one tensor alone is more."""
    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if held and size + own > most:
            yield held
            held, size = {}, 0
        held[name], size = tensor.detach().to("cpu").contiguous(), size + own
    yield held
