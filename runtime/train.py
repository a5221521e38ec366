"""Training a compiled model on bytes: deterministic by step, resumable bit for bit."""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..ir import CheckpointError, DataError
from .data import Text, batch, check_length, windows
from .layout import agreed, as_one, clip_gradients, leading, take_parts, whole_tensors
from .module import CompiledModel
from .rundir import Facts, Moment, Point, fresh_run, load_run, save_run

Tensor = torch.Tensor


@dataclass(frozen=True)
class Options:
    """How to train. It ends after `steps`, or after `minutes`, whichever comes first; 0 means no such limit.

    The clock starts when the first step is done, so that compiling takes nothing from the budget.
    """

    steps: int = 1000
    minutes: float = 0.0
    batch: int = 16
    length: int = 256
    lr: float = 2e-3
    warmup: int = 40
    floor: float = 0.05  # the last learning rate, as a share of the highest
    decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    autocast: bool = False  # bf16 arithmetic over weights as they are
    eval_every: int = 50
    eval_rows: int = 16
    save_every: int = 200


@dataclass(frozen=True)
class Progress:
    """What a progress display needs to know after a step."""

    step: int
    share: float  # of the whole run, 0 to 1
    loss: float
    valid: float
    rate: float  # tokens per second
    left: float  # seconds


@dataclass(frozen=True)
class History:
    """What a run measured, and whether it was interrupted."""

    points: tuple[Point, ...]
    step: int
    seconds: float
    interrupted: bool = False

    @property
    def valid(self) -> float:
        """The last validation loss."""
        return self.points[-1].valid


def _quiet(progress: Progress) -> None:
    """Shows nothing."""


def train(
    model: CompiledModel, text: Text, options: Options, *, run: str | Path | None = None, resume: bool = False,
    progress: Callable[[Progress], None] = _quiet,
) -> History:  # fmt: skip
    """Train a model in place; with a `run` folder checkpoints are kept there, and `resume` continues the last one.

    Ctrl-C ends the run after the step in progress, its checkpoint written. Raises PlaitError for options, text or a
    folder that cannot be used, and for a loss that is no longer finite. On the ranks of a mesh every process calls this alike;
    the first one writes, what one process would write.
    """
    check_options(options)
    check_length(text, options.length)
    folder = None if run is None else Path(run)
    optimizer, state = _optimizer(model, options)
    facts = _facts(model, text)
    moment = _begin(model, state, facts, folder, resume)
    if not moment.points:
        moment = replace(moment, points=(Point(0, 0.0, None, evaluate(model, text.valid, options)),))
    save = partial(_save, folder, model, state, facts, options)
    moment, interrupted = _loop(model, text, options, optimizer, moment, save, progress)
    return History(moment.points, moment.step, moment.seconds, interrupted)


Save = Callable[[Moment], None]


def _loop(
    model: CompiledModel, text: Text, options: Options, optimizer: torch.optim.Optimizer, moment: Moment, save: Save,
    progress: Callable[[Progress], None],
) -> tuple[Moment, bool]:  # fmt: skip
    """Step after step until a limit or a signal."""
    clock, saved, stop = _Clock(moment), moment.step, False
    with interrupts(clock.started) as asked:
        while share(options, moment) < 1 and not stop:
            loss = _step(model, text, options, optimizer, moment)
            seconds, stop = agreed(model.layout, clock.now(), bool(asked))
            moment = replace(moment, step=moment.step + 1, seconds=seconds, losses=(*moment.losses, loss))
            over = share(options, moment) >= 1
            if moment.step % options.eval_every == 0 or over:
                moment = _measured(moment, evaluate(model, text.valid, options))
            if moment.step % options.save_every == 0 and not over:
                save(moment)
                saved = moment.step
            progress(_progress(options, moment, loss, clock))
        if moment.step > saved:
            save(moment)
        return moment, stop


class _Clock:
    """Seconds of training, from the end of this process's first step: that one compiles."""

    def __init__(self, moment: Moment) -> None:
        self.before = moment
        self.first: float | None = None

    def started(self) -> bool:
        return self.first is not None

    def now(self) -> float:
        self.first = time.perf_counter() if self.first is None else self.first
        return self.before.seconds + time.perf_counter() - self.first


def _measured(moment: Moment, valid: float) -> Moment:
    mean = math.fsum(moment.losses) / len(moment.losses)
    return replace(moment, points=(*moment.points, Point(moment.step, round(moment.seconds, 3), mean, valid)), losses=())


def _progress(options: Options, moment: Moment, loss: float, clock: _Clock) -> Progress:
    seconds, steps = moment.seconds - clock.before.seconds, moment.step - clock.before.step - 1
    rate = steps * options.batch * options.length / seconds if seconds else 0.0
    by_step = (options.steps - moment.step) * seconds / steps if options.steps and steps else math.inf
    by_time = 60 * options.minutes - moment.seconds if options.minutes else math.inf
    left = min(by_step, by_time)
    return Progress(moment.step, share(options, moment), loss, moment.points[-1].valid, rate, left if left < math.inf else 0.0)


# -- one step -------------------------------------------------------------------------------


def _step(model: CompiledModel, text: Text, options: Options, optimizer: torch.optim.Optimizer, moment: Moment) -> float:
    """One update; the loss it was computed from."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(options, moment)
    tokens, labels = batch(text.train, rows=options.batch, length=options.length, seed=options.seed, step=moment.step)
    model.train()
    with _precision(options):
        loss = model.loss(tokens, labels, seed=torch.tensor(moment.step))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    clip_gradients(model.layout, dict(model.named_parameters()), options.clip or math.inf)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(f"the loss is {value} at step {moment.step}; lower the learning rate, it is {options.lr:g}, and resume")
    optimizer.step()
    return value


def share(options: Options, moment: Moment) -> float:
    """How much of a run is done, 0 to 1: by steps or by time, whichever is further."""
    by_step = moment.step / options.steps if options.steps else 0.0
    by_time = moment.seconds / (60 * options.minutes) if options.minutes else 0.0
    return min(1.0, max(by_step, by_time))


def learning_rate(options: Options, moment: Moment) -> float:
    """A linear rise over the warm-up steps, under a half cosine that falls to the floor as the run ends."""
    rise = min(1.0, (moment.step + 1) / max(1, options.warmup))
    fall = options.floor + (1 - options.floor) * (1 + math.cos(math.pi * share(options, moment))) / 2
    return options.lr * rise * fall


def evaluate(model: CompiledModel, data: Tensor, options: Options, *, rows: int = 0) -> float:
    """Mean cross entropy per byte, without balance losses, over rows at equal distances in `data`."""
    tokens, labels = windows(data, rows=rows or options.eval_rows, length=options.length)
    model.eval()
    total = 0.0
    with torch.no_grad(), _precision(options):
        for some, wanted in zip(tokens.split(options.batch), labels.split(options.batch), strict=True):
            logits = model.whole_logits(some).float().flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, wanted.flatten())) * len(some)
    return total / len(tokens)


def _precision(options: Options) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=options.autocast)


# -- state ----------------------------------------------------------------------------------


def _optimizer(model: CompiledModel, options: Options) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """AdamW that decays matrices only, and its state by name, ready to be saved or filled."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": options.decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], options.lr, (options.beta1, options.beta2), fused=True)
    state = dict[str, Tensor]()
    for name, parameter in named.items():
        zeros = torch.zeros_like(parameter, requires_grad=False)
        optimizer.state[parameter] = own = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        state |= {f"{k}.{name}": v for k, v in own.items()}
    return optimizer, state


def _begin(model: CompiledModel, state: Mapping[str, Tensor], facts: Facts, run: Path | None, resume: bool) -> Moment:
    named = dict(model.named_parameters())
    if run is not None and resume:
        return _resumed(run, model, named, state, facts)
    with as_one(model.layout):
        if run is not None and leading(model.layout):
            fresh_run(run)
    return Moment()


def _resumed(run: Path, model: CompiledModel, named: Mapping[str, Tensor], state: Mapping[str, Tensor], facts: Facts) -> Moment:
    """Fill parameters and state from a run; each rank of a mesh takes its parts of what one process wrote."""
    if model.layout is None:
        return load_run(run, facts, named, state)
    whole = {name: torch.empty(shape, dtype=named[name].dtype) for name, shape in model.shapes.items()}
    of = _placed_as(state)
    filled = {k: torch.empty_like(whole[of[k]]) if k in of else torch.empty_like(x) for k, x in state.items()}
    with as_one(model.layout):
        moment = load_run(run, facts, whole, filled)
    take_parts(model.layout, named, {name: name for name in named}, whole)
    take_parts(model.layout, state, of, filled)
    return moment


def _placed_as(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The parameter that each tensor of the optimizer's state is placed as; a count of steps is a number."""
    return {key: key.partition(".")[2] for key, tensor in state.items() if tensor.dim()}


def _save(
    run: Path | None, model: CompiledModel, state: Mapping[str, Tensor], facts: Facts, options: Options, moment: Moment
) -> None:
    if run is None:
        return
    named = dict(model.named_parameters())
    whole = whole_tensors(model.layout, named, {name: name for name in named})
    whole_state = whole_tensors(model.layout, state, _placed_as(state))
    with as_one(model.layout):
        if leading(model.layout):
            save_run(run, whole, whole_state, moment, facts, asdict(options))


def _facts(model: CompiledModel, text: Text) -> Facts:
    marks = hashlib.sha256()
    for data in (text.train, text.valid):
        marks.update(str(len(data)).encode() + b":" + data.numpy().tobytes())
    return Facts(model.description, str(next(model.parameters()).dtype).removeprefix("torch."), marks.hexdigest())


def check_options(options: Options) -> None:
    """Refuse options that cannot be."""
    for name in ("batch", "length", "eval_every", "eval_rows", "save_every"):
        if getattr(options, name) < 1:
            raise DataError(f"{name} is {getattr(options, name)}, must be 1 or more")
    for name in ("steps", "minutes", "warmup", "seed", "decay", "clip"):
        if not 0 <= getattr(options, name) < math.inf:
            raise DataError(f"{name} is {getattr(options, name)}, must be 0 or more")
    if not 0 < options.lr < math.inf:
        raise DataError(f"lr is {options.lr}, must be more than 0, for instance {Options.lr}")
    if not options.steps and not options.minutes:
        raise DataError("steps and minutes are both 0; give one of them a limit")


def options_of(stored: Mapping[str, Any]) -> Options:
    """The options that a run stored; a field that is missing or of another kind is refused."""
    for field in fields(Options):
        value, default = stored.get(field.name), field.default
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise CheckpointError(f"the run's options: {field.name} is {value!r}, must be like {default!r}")
    return Options(**{f.name: stored[f.name] for f in fields(Options)})


@contextmanager
def interrupts(ready: Callable[[], bool]) -> Generator[list[int]]:
    """A list that Ctrl-C or a polite kill fills, so that the step in progress ends first; a second one ends it at once.

    Until `ready`, the first one does: there is nothing yet to keep.
    """
    asked = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        asked.append(number)
        for s, handler in before.items():
            signal.signal(s, handler)
        if not ready():
            raise KeyboardInterrupt

    for s in before:
        signal.signal(s, note)
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
