"""Interleaved timing: variants take turns, samples that a neighbour disturbed are dropped, medians are kept."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Thunk = Callable[[], object]

# The share of a sample's wall time that may be lost to other processes before the sample is dropped. /proc/stat counts in
# steps of 10 ms, which is 4 % of the shortest sample, so a smaller share could not be told from nothing.
DISTURBED = 0.06
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Clock:
    """One reading, in seconds: of the wall, of our CPU time, of our threads' wait for a core, of the machine."""

    wall: float
    own: float
    waited: float
    busy: float
    stolen: float


@dataclass(frozen=True)
class Sample:
    """One stretch of repeated calls: seconds per call, and the shares of its wall time that others took."""

    seconds: float
    waited: float
    others: float
    stolen: float

    @property
    def lost(self) -> float:
        """The share lost: our threads waited for a core while somebody else had one, or the hypervisor took one away."""
        return max(min(self.waited, self.others), self.stolen)

    @property
    def disturbed(self) -> bool:
        """Too much was lost for the sample to count."""
        return self.lost > DISTURBED


@dataclass(frozen=True)
class Timing:
    """What the samples of one variant say, in seconds per call."""

    median: float
    low: float
    high: float
    kept: int
    dropped: int
    quiet: bool

    def record(self) -> dict[str, float | int | bool]:
        """The timing as a JSON object."""
        return asdict(self)


def read_clock() -> Clock:
    """Reads every clock a sample is judged by."""
    busy, stolen = _machine()
    return Clock(time.perf_counter(), time.process_time(), _waited(), busy, stolen)


def take(call: Thunk, seconds: float) -> Sample:
    """Times calls for at least so many seconds."""
    repeats, before = 0, read_clock()
    while repeats == 0 or time.perf_counter() - before.wall < seconds:
        call()
        repeats += 1
    after = read_clock()
    wall = after.wall - before.wall
    others = (after.busy - before.busy) - (after.own - before.own)
    shares = (after.waited - before.waited, others, after.stolen - before.stolen)
    waited, others, stolen = (max(0.0, share) / wall for share in shares)
    if torch.get_num_threads() == 1:
        # What one thread waited is known exactly and comes off; several threads also wait for each other.
        wall, waited = wall * max(0.0, 1.0 - waited), 0.0
    return Sample(wall / repeats, waited, others, stolen)


def interleave(
    variants: Mapping[str, Thunk], *, samples: int = 5, seconds: float = 0.25, patience: float = 0.0, budget: float = 120.0
) -> dict[str, Timing]:
    """Times the variants in turn until each has enough clean samples or, with as many of any kind, the budget is spent."""
    for call in variants.values():
        call()
        call()
    taken: dict[str, list[Sample]] = {name: [] for name in variants}
    end, turn = time.perf_counter() + budget, 0
    while _wanting(taken, samples) and (turn < samples or time.perf_counter() < end):
        # The order turns round, so that no variant always runs in another one's cache.
        names = list(variants)[turn % len(variants) :] + list(variants)[: turn % len(variants)]
        for name in [name for name in names if name in _wanting(taken, samples)]:
            patience -= wait_until_quiet(patience)
            taken[name].append(take(variants[name], seconds))
        turn += 1
    return {name: summarize(each, samples) for name, each in taken.items()}


def summarize(taken: list[Sample], samples: int) -> Timing:
    """The median of the clean samples; of the least disturbed ones, and said so, where too few are clean."""
    clean = [sample for sample in taken if not sample.disturbed]
    quiet = len(clean) >= samples
    kept = [each.seconds for each in (clean if quiet else sorted(taken, key=lambda sample: sample.lost)[:samples])]
    return Timing(statistics.median(kept), min(kept), max(kept), len(kept), len(taken) - len(kept), quiet)


def wait_until_quiet(patience: float) -> float:
    """Waits, so many seconds at most, until other processes leave us the cores our threads need; gives the time waited."""
    spare = (os.cpu_count() or 1) - torch.get_num_threads()
    start = time.perf_counter()
    while time.perf_counter() - start < patience:
        before = read_clock()
        time.sleep(0.1)
        after = read_clock()
        others = (after.busy - before.busy - (after.own - before.own)) / (after.wall - before.wall)
        if others <= spare + 0.15:
            break
    return time.perf_counter() - start


def _wanting(taken: Mapping[str, list[Sample]], samples: int) -> set[str]:
    """The variants that still lack clean samples."""
    return {name for name, each in taken.items() if sum(not sample.disturbed for sample in each) < samples}


def _waited() -> float:
    """Seconds our threads were ready to run and had no core, from the scheduler's own account."""
    return sum(_delay(each) for each in Path("/proc/self/task").glob("*/schedstat")) / 1e9


def _delay(schedstat: Path) -> int:
    try:
        return int(schedstat.read_text().split()[1])
    except (OSError, IndexError):
        return 0  # a thread that ended between the listing and the reading


def _machine() -> tuple[float, float]:
    """Busy and stolen seconds of all cores together."""
    try:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq) / TICK, steal / TICK
