"""Meshes as text: `cp=2,tp=4`."""

from __future__ import annotations

import re

from .errors import PlacementError
from .graph import check_name
from .types import Mesh


def parse_mesh(text: str) -> Mesh:
    """The mesh of `cp=2,tp=4` (or `cp=2 tp=4`); ranks count through the last axis fastest."""
    axes = list[tuple[str, int]]()
    for part in re.sub(r"\s*,\s*", " ", text).split():
        found = re.fullmatch(r"([^=]+)=([1-9]\d{0,5})", part, re.ASCII)
        if not found or found[1] in dict(axes):
            must = "named axes and their ranks, each name once, such as 'cp=2,tp=4'"
            raise PlacementError(f"mesh is {text[:60]!r}; {part!r} stands where there must be {must}")
        axes.append((check_name(found[1], "mesh axis"), int(found[2])))
    return Mesh(tuple(axes))


def mesh_text(mesh: Mesh) -> str:
    """`cp=2,tp=4`, as `parse_mesh` reads it."""
    return ",".join(f"{name}={size}" for name, size in mesh.axes)
