"""A sharded checkpoint on disk, as torch.distributed.checkpoint's storage: safetensors files and a manifest, no pickles.

folder/rank-00000.safetensors     the blocks that one process held, named `<parameter>@<offset>,<offset>`
folder/manifest.json              of each parameter its dtype, whole shape and blocks; of each file its digest
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ..ir import DTYPES, CheckpointError
from ..ir.files import write_text
from .checkpoint import save_tensors
from .rundir import digest

FORMAT, MANIFEST = "plait-shards-1", "manifest.json"
_FILE = re.compile(r"rank-\d{5}\.safetensors", re.ASCII)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _label(index: MetadataIndex) -> str:
    """A block's name in its file."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _done(value: Any) -> Any:
    made: Future[Any] = Future()
    made.set_result(value)
    return made


class Writer(StorageWriter):
    """Each process writes its blocks into one file; the first one writes the manifest, last."""

    def __init__(self, folder: Path, rank: int, facts: Mapping[str, str]) -> None:
        self.folder, self.rank, self.facts = folder, rank, facts

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not plan.items:
            return _done([])
        path = self.folder / f"rank-{self.rank:05d}.safetensors"
        tensors = {_label(item.index): cast(torch.Tensor, planner.resolve_data(item)) for item in plan.items}
        save_tensors(path, tensors, {"format": FORMAT})
        where = (path.name, digest(path))
        return _done([WriteResult(i.index, i.tensor_storage_size() or 0, where) for i in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        at = {_label(r.index): r.storage_data for some in results for r in some}
        tensors = dict[str, Any]()
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            labelled = [(c, at[_label(MetadataIndex(name, c.offsets))][0]) for c in stored.chunks]
            blocks = [{"offsets": [*c.offsets], "sizes": [*c.sizes], "file": file} for c, file in labelled]
            tensors[name] = {"dtype": _NAMES[stored.properties.dtype], "size": [*stored.size], "blocks": blocks}
        manifest = {"format": FORMAT, **self.facts, "digests": dict(sorted(set(at.values()))), "tensors": tensors}
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads blocks of files whose digests are those of the manifest."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest, self.files = folder, manifest, dict[MetadataIndex, str]()

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, files = dict[str, Any](), dict[MetadataIndex, str]()
        for name, stored in self.manifest["tensors"].items():
            chunks = [ChunkStorageMetadata(torch.Size(b["offsets"]), torch.Size(b["sizes"])) for b in stored["blocks"]]
            kind = TensorProperties(DTYPES[stored["dtype"]])
            tensors[name] = TensorStorageMetadata(kind, torch.Size(stored["size"]), chunks)
            files |= {MetadataIndex(name, b["offsets"]): b["file"] for b in stored["blocks"]}
        return Metadata(tensors, storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = dict[str, list[ReadItem]]()
        for item in plan.items:
            by_file.setdefault(self.files[item.storage_index], []).append(item)
        for name, items in by_file.items():
            path = self.folder / name
            if digest(path) != self.manifest["digests"].get(name):
                raise CheckpointError(f"{path}: is damaged, its digest is not the one in {MANIFEST}; save again")
            try:
                _read(path, items, planner)
            except SafetensorError as error:
                raise CheckpointError(f"{path}: is not what {MANIFEST} says: {error}") from None
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _read(path: Path, items: list[ReadItem], planner: LoadPlanner) -> None:
    with safe_open(str(path), framework="pt") as file:
        for item in items:
            stretch = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
            label = _label(item.storage_index)
            found = file.get_slice(label)[stretch] if stretch else file.get_tensor(label)
            planner.resolve_tensor(item).copy_(found)


# -- the manifest -----------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, each field of its kind; CheckpointError where there is none, or it was damaged."""
    path = folder / MANIFEST
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; the folder is no sharded checkpoint, or a part of one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error)[:200]}") from None
    if not isinstance(found, dict) or cast("dict[str, Any]", found).get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format must be {FORMAT!r}; it was not written by save_sharded")
    manifest = cast("dict[str, Any]", found)
    sound = _texts(manifest.get("digests")) and isinstance(manifest.get("tensors"), dict)
    if not sound or not all(_is_tensor(t) for t in manifest["tensors"].values()):
        raise CheckpointError(f"{path}: its tensors do not read; it is damaged")
    return manifest


def _texts(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(x, str) for x in cast("dict[Any, Any]", found).values())


def _is_tensor(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    stored = cast("dict[str, Any]", found)
    size, blocks = _shape(stored.get("size")), stored.get("blocks")
    if stored.get("dtype") not in DTYPES or size is None or not isinstance(blocks, list):
        return False
    return all(_is_block(b, size) for b in cast("list[Any]", blocks))


def _is_block(found: Any, size: list[int]) -> bool:
    """A block that lies inside the tensor, in a file beside the manifest."""
    if not isinstance(found, dict):
        return False
    block = cast("dict[str, Any]", found)
    offsets, sizes, file = _shape(block.get("offsets")), _shape(block.get("sizes")), block.get("file")
    if offsets is None or sizes is None or not isinstance(file, str) or not _FILE.fullmatch(file):
        return False
    return len(offsets) == len(sizes) == len(size) and all(a + n <= m for a, n, m in zip(offsets, sizes, size, strict=True))


def _shape(found: Any) -> list[int] | None:
    if not isinstance(found, list):
        return None
    numbers = cast("list[Any]", found)
    return numbers if all(type(n) is int and 0 <= n < 2**62 for n in numbers) else None
