"""Checkpoints that every process writes its part of: saved on one mesh, read on any other, or in one process.

torch.distributed.checkpoint plans who writes and who reads what; blocks are those of the whole tensor in its natural
order, whatever the order in which ranks hold it.
"""

from __future__ import annotations

import shutil
import warnings
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..ir import CheckpointError, PlaitError, TensorType
from .checkpoint import misfits
from .layout import Layout, as_one, leading
from .mesh import MeshError
from .module import CompiledModel
from .parts import Piece, pieces
from .shard_files import MANIFEST, Reader, Writer, read_manifest

Tensor = torch.Tensor
Blocks = dict[str, list[tuple[Piece, Tensor]]]


def save_sharded(model: CompiledModel, folder: Path | str) -> None:
    """Write a new folder; it has its name only once everything is in it. All ranks call this."""
    folder, layout = Path(folder), model.layout
    beside = folder.with_name(folder.name + ".part")
    with as_one(layout):
        if leading(layout):
            _prepare(folder, beside)
    rank = layout.world.rank if layout else 0
    writer = Writer(beside, rank, {"spec": model.description})
    held = _blocks(model)
    mine = {name: blocks if _writes(layout, name) else [] for name, blocks in held.items()}
    _guarded(folder, lambda: save({}, storage_writer=writer, planner=_Saving(mine, model.shapes), no_dist=layout is None))
    with as_one(layout):
        if leading(layout):
            _rename(beside, folder)


def load_sharded(model: CompiledModel, folder: Path | str) -> CompiledModel:
    """Fill the parameters from a folder that `save_sharded` wrote on any mesh; all ranks call this."""
    folder, layout = Path(folder), model.layout
    planner = _Loading(folder, _blocks(model), model.shapes)
    with as_one(layout):
        reader = Reader(folder, read_manifest(folder))
    with torch.no_grad():
        _guarded(folder, lambda: load({}, storage_reader=reader, planner=planner, no_dist=layout is None))
    return model


def _guarded(folder: Path, step: Any) -> None:
    """torch tells every rank what failed on any; as one message."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process it is
            step()
    except CheckpointException as error:
        first = dict[str, str]()
        for rank, (cause, _) in sorted(error.failures.items()):
            first.setdefault(_said(cause), f"rank {rank}: {_said(cause)}")
        raise CheckpointError("; ".join(first.values())) from error
    except RuntimeError as error:  # what a backend raises when a peer has died
        raise MeshError(f"{folder}: another rank stopped: {str(error).splitlines()[0][:300]}; see what it says") from error


def _said(cause: BaseException) -> str:
    return str(cause) if isinstance(cause, PlaitError) else f"{type(cause).__name__}: {str(cause)[:300]}"


def _prepare(folder: Path, beside: Path) -> None:
    """Room for a new checkpoint: what an interrupted save has left is removed, what is whole is not."""
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; give another folder, or remove it")
    try:
        if beside.exists():
            for old in (*beside.glob("rank-*.safetensors"), *beside.glob(".rank-*"), beside / MANIFEST):
                old.unlink(missing_ok=True)
        beside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{beside}: cannot be made: {error.strerror or error}") from None


def _rename(beside: Path, folder: Path) -> None:
    try:
        beside.replace(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _blocks(model: CompiledModel) -> Blocks:
    """The blocks of the whole that this process holds, as views of its parameters."""
    found = Blocks()
    for name, p in model.named_parameters():
        whole = [Piece((0,) * p.dim(), (0,) * p.dim(), tuple(p.shape))]
        held = whole if model.layout is None else pieces(model.layout.types[name], model.shapes[name], model.layout.place)
        found[name] = [(piece, piece.of(p.detach())) for piece in held]
    return found


def _writes(layout: Layout | None, name: str) -> bool:
    """Whether this process is the first of those that hold the same."""
    if layout is None:
        return True
    split = _split(layout.types[name])
    return all(group.rank == 0 for axis, group in layout.world.groups.items() if axis not in split)


def _split(type_: TensorType) -> set[str]:
    return {axis for d in type_.dims for axis in d.axes}


class _Saving(DefaultSavePlanner):
    """What this process writes; the default planner checks that all blocks together are the whole."""

    def __init__(self, blocks: Blocks, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.blocks, self.shapes = blocks, shapes

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(MetadataIndex(name, p.offsets), WriteItemType.SHARD, tensor_data=self._data(name, p, x))
            for name, held in self.blocks.items()
            for p, x in held
        ]
        self.plan = SavePlan(items)
        return self.plan

    def _data(self, name: str, piece: Piece, x: Tensor) -> TensorWriteData:
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        return TensorWriteData(chunk, TensorProperties(x.dtype), torch.Size(self.shapes[name]))

    def lookup_object(self, index: MetadataIndex) -> Any:
        return next(x for p, x in self.blocks[index.fqn] if p.offsets == tuple(index.offset or ()))


class _Loading(DefaultLoadPlanner):
    """What this process reads, from blocks of whatever shape."""

    def __init__(self, folder: Path, blocks: Blocks, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.folder, self.blocks, self.shapes = folder, blocks, shapes

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = {k: m for k, m in self.metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
        if problems := misfits({k: tuple(m.size) for k, m in stored.items()}, self.shapes):
            raise CheckpointError(f"{self.folder}: its tensors do not fit the model\n" + "\n".join(f"  {p}" for p in problems))
        items = list[Any]()
        for name, held in self.blocks.items():
            wanted = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p, _ in held]
            found = create_read_items_for_chunk_list(name, stored[name], wanted)
            if sum(prod(i.lengths) for i in found) != sum(prod(p.sizes) for p, _ in held):
                raise CheckpointError(f"{self.folder}: the blocks of {name} do not make up the whole; save again")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return next(x for p, x in self.blocks[index.fqn] if p.offsets == tuple(index.offset or ()))
