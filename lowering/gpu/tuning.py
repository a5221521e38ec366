"""Choosing launch configurations: a small space around the default, held against the static gates, then timed on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .aot import CompileError, Job, compile_all
from .machine import TARGETS
from .resources import resources
from .tuned import Name, Numbers, asked, forced

BOUNDS: Mapping[str, tuple[int, int]] = {"warps": (1, 16), "stages": (1, 4)}
BLOCK = (16, 256)  # that any other field, a tile's size, may be
SAMPLES, WARMUP = 7, 2
WORTH = 0.98  # of the default's time: less gain is noise, and the default stays

Say = Callable[[str], None]
Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Work:
    """What is tuned: a call whose kernels ask `tuned` for their configurations."""

    name: str
    jobs: Callable[[str], Sequence[Job]]  # what a target would compile, with the configurations in force
    call: Callable[[], Callable[[], object]]  # makes, with the configurations in force, what is one call on the device


@dataclass(frozen=True)
class Chosen:
    """The outcome for one key: the configuration, and what was seen of it."""

    work: str
    name: Name
    default: Any
    best: Any
    seconds: Mapping[str, float]  # by configuration, of those that were timed
    refused: Mapping[str, str]  # by configuration, why a gate keeps it out

    @property
    def told(self) -> str:
        """One line: what was chosen, and why."""
        target, key = self.name
        said = described(self.best)
        if not self.seconds:
            return f"{target} {key}: {said}, the default; {len(self.refused)} others refused, none timed"
        took = self.seconds[said]
        why = "the default stays" if self.best == self.default else self._gain(took)
        return f"{target} {key}: {said} in {took * 1e6:.1f} us of {len(self.seconds)} timed; {why}"

    def _gain(self, took: float) -> str:
        base = self.seconds.get(described(self.default))
        return f"{base / took:.2f}x of the default's speed" if base else "the gates refuse the default"


def described(configuration: Any) -> str:
    """`key=128 value=64 warps=4 stages=2`."""
    return " ".join(f"{name}={n}" for name, n in asdict(configuration).items())


def space(default: Any) -> list[Any]:
    """The default first, then what differs from it in one field, halved or doubled."""
    made = [default]
    for field in fields(default):
        n = getattr(default, field.name)
        low, high = BOUNDS.get(field.name, BLOCK)
        made += [replace(default, **{field.name: m}) for m in (n // 2, n * 2) if low <= m <= high]
    return made


def keys(work: Work, target: str) -> Mapping[Name, Any]:
    """Every configuration that the work asks for, with its default."""
    with asked() as seen:
        work.jobs(target)
    return {name: default for name, default in seen.items() if name[0] == target}


def refusal(work: Work, target: str) -> str:
    """Why the static gates keep the configurations in force out; empty where all kernels pass."""
    for made in compile_all([*work.jobs(target)]):
        if isinstance(made, CompileError):
            return str(made).splitlines()[-1]
        used = resources(made)
        if used.spills or used.stack:
            return f"{made.name} spills registers: {used.spills} times, {used.stack} bytes a thread"
        if made.shared > TARGETS[target].shared:
            return f"{made.name} needs {made.shared} bytes of shared memory"
        if target == "sm_90" and "HMMA" in used.tensor_core:
            return f"{made.name} falls to HMMA, which half of the tensor cores' speed cannot be had by"
    return ""


def tune(
    works: Sequence[Work], target: str, *, budget: float, clock: Clock | None, say: Say, known: Mapping[Name, Numbers]
) -> Generator[Chosen]:
    """A choice for every key that the table does not know, as each is made; stops when `budget` seconds are spent.

    Without a clock nothing is timed: the gates alone are told, and defaults stay. Results are right with any configuration;
    another one may round otherwise, the same one never.
    """
    end = time.monotonic() + budget
    for work in works:
        for name, default in keys(work, target).items():
            if name in known:
                continue
            if time.monotonic() >= end:
                say(f"the budget of {budget:g} seconds is spent; {work.name} and what follows keep their defaults")
                return
            yield _choose(work, name, default, end, clock)


def _choose(work: Work, name: Name, default: Any, end: float, clock: Clock | None) -> Chosen:
    seconds, refused, best = dict[str, float](), dict[str, str](), default
    for tried in space(default):
        if tried != default and time.monotonic() >= end:
            break
        with forced({name: asdict(tried)}):
            if why := refusal(work, name[0]):
                refused[described(tried)] = why
                continue
            if clock is not None:
                seconds[described(tried)] = clock(work.call())
        best = tried if _better(seconds, described(tried), described(best), described(default)) else best
    return Chosen(work.name, name, default, best, seconds, refused)


def _better(seconds: Mapping[str, float], tried: str, best: str, default: str) -> bool:
    """Whether what was tried takes the place of the best: of the default only by more than noise, or if a gate refuses that."""
    if best not in seconds:
        return tried in seconds
    return tried in seconds and seconds[tried] < seconds[best] * (WORTH if best == default else 1.0)


def device_seconds(run: Callable[[], object]) -> float:
    """The median time of a call on the CUDA device, in seconds."""
    import torch

    for _ in range(WARMUP):
        run()
    taken = list[float]()
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)
