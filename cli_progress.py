"""How a long training shows itself: a bar on a terminal, a line per measurement anywhere else; always on stderr."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from plait.cli_output import count, note

if TYPE_CHECKING:
    from plait.runtime.train import Progress

Show = Callable[["Progress"], None]


@contextmanager
def training_bar() -> Generator[Show]:
    """What to call after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (BarColumn(24), TaskProgressColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("compiling", total=1.0)
        yield lambda p: bar.update(task, completed=p.share, description=line(p))


def _lines() -> Show:
    """A line whenever the validation loss is a new one."""
    last = math.nan

    def show(progress: Progress) -> None:
        nonlocal last
        if progress.valid != last:
            last = progress.valid
            note(line(progress))

    return show


def line(progress: Progress) -> str:
    """`step 120  loss 1.934  validation 2.011  5.1k bytes/s  3:05 left`."""
    parts = [f"step {progress.step}", f"loss {progress.loss:.3f}", f"validation {progress.valid:.3f}"]
    if progress.rate:
        parts += [f"{count(progress.rate)} bytes/s", f"{clock(progress.left)} left"]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """`3:05`, or `1:02:05`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
