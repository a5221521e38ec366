"""Mixed models on four processes: every way, order and axis gives the loss and the gradients of one process.

`python -m tests.matrix_worker FOLDER WORLD full` runs every combination, on two processes too.
"""

from __future__ import annotations

from pathlib import Path

from tests.matrix_worker import BOUND, cases, start


def test_every_case_equals_one_process(tmp_path: Path) -> None:
    found = start(tmp_path, 4)
    assert found.keys() == {str(c) for c in cases(4, full=False)} and len(found) >= 10
    assert {k: v for k, v in found.items() if v[0] > BOUND} == {}
