"""Mixed models on two and four processes: every way, order and mesh gives the loss and the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix_worker import BOUND, cases, start


@pytest.mark.parametrize("world", [2, 4])
def test_every_case_equals_one_process(world: int, tmp_path: Path) -> None:
    found = start(tmp_path, world)
    assert found.keys() == {str(c) for c in cases(world, full=False)} and len(found) >= 10
    assert {k: v for k, v in found.items() if v[0] > BOUND} == {}
