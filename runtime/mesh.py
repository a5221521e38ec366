"""The ranks of a mesh as processes: who is where, process groups by axis, and a handshake before anything moves."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..ir import Mesh, PlaitError, mesh_text, parse_mesh
from ..lowering.forms.traffic import AxisGroup, MeshError, use_axes

_CARD = 4096  # bytes that each rank shows the others in a handshake: one size, whatever they disagree on
_LINE, _FACTS, _PROBLEM = 100, 12, 1600  # characters of a value, how many there may be, and those of a rank's own trouble


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank of a mesh, its device, and its process group along every axis."""

    mesh: Mesh
    rank: int
    device: torch.device
    groups: Mapping[str, AxisGroup]
    devices: DeviceMesh | None = None  # the same mesh as torch has it, for DistributedDataParallel and fully_shard


_HERE = list[Place]()  # the place of this process, once it has joined


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process."""

    rank: int
    world: int
    local_rank: int


def launched() -> Launch:
    """What torchrun set in the environment, which is read here alone."""
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    found["LOCAL_RANK"] = found["LOCAL_RANK"] or found["RANK"]
    for name, value in found.items():
        if not re.fullmatch(r"\d{1,6}", value, re.ASCII):
            raise MeshError(f"{name} is {value!r}, must be a number; start with `torchrun --nproc-per-node N SCRIPT`")
    return Launch(int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"]))


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def init(mesh: str, *, device: str = "", store: str = "env://", timeout: float = 600.0) -> Place:
    """Join the other ranks of `mesh` and use its axes from here on; gloo on processors, NCCL on GPUs.

    Every rank that disagrees about the mesh, or waits `timeout` seconds for the others, raises MeshError.
    """
    shape, here = parse_mesh(mesh), launched()
    ranks = prod(size for _, size in shape.axes)
    if ranks != here.world:
        wanted = f"mesh {mesh or '()'} has {ranks} ranks"
        raise MeshError(f"{wanted}, but {here.world} processes were started; start {ranks}, or give a mesh of {here.world}")
    if dist.is_initialized():
        raise MeshError("this process has joined a mesh already; close it before it joins another")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    at = torch.device("cuda", here.local_rank) if kind == "cuda" else torch.device(kind)
    if at.type == "cuda":
        torch.cuda.set_device(at)
    _join(here, "nccl" if at.type == "cuda" else "gloo", store, timeout)
    place = Place(shape, here.rank, at, {})
    handshake(place, {"mesh": mesh_text(shape), "torch": torch.__version__})
    place = _grouped(Place(shape, here.rank, at, {}))
    use(place)
    return place


def here() -> Place:
    """Where this process stands; MeshError before it has joined a mesh."""
    if not _HERE:
        raise MeshError("this process has joined no mesh; call plait.init('cp=2') first, in every process")
    return _HERE[0]


def within(place: Place, mesh: Mesh) -> Place:
    """The ranks that run one program, where the mesh has axes beside those of the program."""
    for axis, size in mesh.axes:
        if axis not in place.mesh or place.mesh[axis] != size:
            joined = f"the mesh that this process has joined, {mesh_text(place.mesh) or '()'}"
            raise MeshError(f"axis {axis}={size} is none of {joined}; join one that has it")
    at = {axis: place.groups[axis].rank for axis, _ in mesh.axes}
    return replace(place, mesh=mesh, rank=mesh.ranks.index(at), groups={axis: place.groups[axis] for axis in at})


def _join(here: Launch, backend: str, store: str, timeout: float) -> None:
    wait = timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, init_method=store, timeout=wait, world_size=here.world, rank=here.rank)
    except RuntimeError as error:  # a store says DistError, which is one; gloo says no more than RuntimeError
        raise MeshError(_alone(here.rank, f"join {here.world} ranks at {store}", error)) from error


def _alone(rank: int, what: str, error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"rank {rank} could not {what}: {first[:300]}; another rank stopped or never came: see what it says"


def _grouped(place: Place) -> Place:
    """With one process group per axis, by name; functional collectives learn here how they compile."""
    import torch.distributed._functional_collectives  # noqa: F401  # pyright: ignore[reportUnusedImport] # slow; gives the ops fake kernels

    shape = place.mesh
    if not shape.axes:
        return place
    names = tuple(name for name, _ in shape.axes)
    devices = init_device_mesh(place.device.type, tuple(size for _, size in shape.axes), mesh_dim_names=names)
    found = {name: devices.get_group(name) for name in names}
    groups = {name: AxisGroup(str(g.group_name), shape[name], devices.get_local_rank(name)) for name, g in found.items()}
    return replace(place, groups=groups, devices=devices)


def use(place: Place) -> None:
    """Run collectives over the axes of this place from here on."""
    use_axes(place.groups)
    _HERE[:] = [place]


def close() -> None:
    """Leave the mesh."""
    use_axes({})
    _HERE.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


# -- the handshake ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Near:
    """What must be one among ranks that differ in these axes alone: copies of a program may have inputs of their own."""

    facts: Mapping[str, str]
    axes: Mesh


def handshake(place: Place, facts: Mapping[str, str], problem: str = "", near: Near | None = None) -> None:
    """Before anything moves: every rank raises the same MeshError if the ranks disagree on a fact, or one has a `problem`.

    A rank that cannot go on comes here too and says why, so that the others do not wait for it.
    """
    close_by = near.facts if near else {}
    assert len(facts) + len(close_by) <= _FACTS
    cards = [_read(card) for card in _exchange(place, _card({**facts, **close_by}, problem))]
    if troubles := [f"rank {r}: {trouble}" for r, (trouble, _) in enumerate(cards) if trouble]:
        raise MeshError("; ".join(troubles))
    everyone = [*range(len(cards))]
    teams = _teams(place.mesh, near.axes) if near else [everyone]
    found = list[str]()
    for name in dict.fromkeys(name for _, shown in cards for name in shown):
        values = [shown.get(name, "absent") for _, shown in cards]
        apart = (team for team in (teams if name in close_by else [everyone]) if len({values[r] for r in team}) > 1)
        found += [_told(name, {r: values[r] for r in team}) for team in apart]
    if found:
        told = "; ".join(found)
        raise MeshError(f"the ranks do not run one program: {told}; start all of them from the same spec, inputs and version")


@contextmanager
def together(place: Place, facts: Mapping[str, str] | None = None) -> Generator[None]:
    """What one rank cannot do, no rank has done: a PlaitError inside, on any rank, is a MeshError on every one."""
    try:
        yield
    except MeshError:
        raise
    except PlaitError as error:
        handshake(place, facts or {}, str(error))
        raise
    handshake(place, facts or {})


def _teams(mesh: Mesh, axes: Mesh) -> list[list[int]]:
    """The ranks that differ in these axes alone."""
    found = dict[tuple[tuple[str, int], ...], list[int]]()
    for rank, at in enumerate(mesh.ranks):
        found.setdefault(tuple((k, v) for k, v in at.items() if k not in axes), []).append(rank)
    return list(found.values())


def _told(name: str, values: Mapping[int, str]) -> str:
    """`mesh is cp=2 on rank 0, tp=2 on rank 1`."""
    by_value = dict[str, list[str]]()
    for rank, value in values.items():
        by_value.setdefault(value, []).append(str(rank))
    ranks = [f"{v or 'empty'} on rank{'s' if len(on) > 1 else ''} {_listed(on)}" for v, on in by_value.items()]
    return f"{name} is {', '.join(ranks)}"


def _listed(ranks: list[str]) -> str:
    return ", ".join(ranks if len(ranks) <= 8 else [*ranks[:8], f"and {len(ranks) - 8} more"])


def _plain(text: str, length: int) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:length]


def _stamp(value: str) -> str:
    """Text of one line that is equal for equal values only: the value, or its digest where it is long."""
    if len(value) <= _LINE and value == _plain(value, _LINE):
        return value
    return f"text of {len(value)} characters with sha256 {hashlib.sha256(value.encode()).hexdigest()[:32]}"


def _card(facts: Mapping[str, str], problem: str) -> bytes:
    lines = [_plain(problem, _PROBLEM), *(f"{_plain(name, _LINE)}={_stamp(value)}" for name, value in facts.items())]
    return "\n".join(lines).encode("ascii").ljust(_CARD, b"\0")


def _read(card: bytes) -> tuple[str, dict[str, str]]:
    problem, *lines = card.rstrip(b"\0").decode("ascii").split("\n")
    pairs = [line.partition("=") for line in lines]
    return problem, {name: value for name, _, value in pairs}


def _exchange(place: Place, card: bytes) -> list[bytes]:
    """Every rank's card, in rank order."""
    own = torch.frombuffer(bytearray(card), dtype=torch.uint8).to(place.device)
    cards = [torch.empty_like(own) for _ in place.mesh.ranks]
    try:
        dist.all_gather(cards, own)
    except RuntimeError as error:  # what every backend raises when a peer has died or is late
        raise MeshError(_alone(place.rank, "hear from all ranks", error)) from error
    return [bytes(c.cpu().numpy()) for c in cards]
