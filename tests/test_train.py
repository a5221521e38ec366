"""Training: it learns, it resumes bit for bit, and its checkpoints survive a kill at any moment."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plait.ir.files as files
import pytest
import torch
from plait.api import compile
from plait.ir import CheckpointError, DataError, PlaitError
from plait.runtime import CompiledModel
from plait.runtime.data import Text, batch, split, windows
from plait.runtime.rundir import Moment, checkpoint_file, clear_run, latest, stored_options
from plait.runtime.train import Options, Progress, evaluate, interrupts, learning_rate, options_of, share, train

SPEC: dict[str, Any] = {
    "name": "small", "vocab": 256, "hidden": 16, "pattern": "GEM*", "tied": True,
    "gdn": {"key_heads": 1, "value_heads": 2, "key_dim": 8, "value_dim": 8},
    "mamba2": {"heads": 2, "head_dim": 8, "state": 8},
    "attention": {"heads": 2, "kv_heads": 1, "head_dim": 8, "gate": True},
    "moe": {"experts": 3, "top_k": 2, "width": 8, "aux_loss": 0.01},
}  # fmt: skip
FAST = Options(steps=10, batch=3, length=17, warmup=3, eval_every=4, eval_rows=2, save_every=6, lr=1e-2)
Bits = dict[str, torch.Tensor]


def small(seed: int = 0, **changes: Any) -> CompiledModel:
    fields = {k: v for k, v in (SPEC | changes).items() if v is not None}
    return compile(fields, dtype="f32", jit=False, seed=seed)


@pytest.fixture
def text() -> Text:
    return split(torch.frombuffer(bytearray(b"def f(x): return g(x) + 1\n" * 80), dtype=torch.uint8), 0.1)


def bits(model: CompiledModel) -> Bits:
    return {k: v.detach().clone() for k, v in model.named_parameters()}


def same(a: Bits, b: Bits) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(Exception):
    """Stands for a kill."""


def dying_at(step: int) -> Callable[[Progress], None]:
    def check(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    return check


# -- learning -------------------------------------------------------------------------------


def test_it_learns(text: Text) -> None:
    model, seen = small(), list[Progress]()
    history = train(model, text, replace(FAST, steps=60, eval_every=20), progress=seen.append)
    assert history.points[0].valid == pytest.approx(math.log(256), abs=0.2) and history.points[0].loss is None
    assert history.valid < 2.5 and history.step == 60 and not history.interrupted
    assert [p.step for p in history.points] == [0, 20, 40, 60] and [p.step for p in seen] == [*range(1, 61)]
    assert seen[-1].share == 1 and seen[-1].left == 0 and seen[-1].rate > 0


def test_the_first_step_is_the_one_of_the_book(text: Text) -> None:
    """Clipping, decay of matrices alone and AdamW itself, against a few lines of float64."""
    model, options = small(), replace(FAST, steps=1, clip=0.05, decay=0.3)
    before = {k: v.double() for k, v in bits(model).items()}
    tokens, labels = batch(text.train, rows=3, length=17, seed=0, step=0)
    model.loss(tokens, labels).backward()
    grads = {k: p.grad.double() for k, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    assert norm > options.clip and len(grads) == len(before)
    train(model, text, options)
    lr = options.lr / 3
    for name, after in bits(model).items():
        g = grads[name] * options.clip / (norm + 1e-6)
        decayed = before[name] * (1 - lr * options.decay * (before[name].dim() >= 2))
        want = decayed - lr * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after.double(), want, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_is_plain_cross_entropy(text: Text) -> None:
    model = small()
    tokens, labels = windows(text.valid, rows=5, length=17)
    with torch.no_grad():
        logits = model.eval()(tokens).double()
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        with_balance = model.loss(tokens, labels)
    found = evaluate(model, text.valid, replace(FAST, eval_rows=5))
    assert found == pytest.approx(float(want), rel=1e-6) and float(with_balance) > found + 1e-3


def test_every_step_has_its_own_batch_and_every_point_the_mean(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, losses, whole = list[torch.Tensor](), list[float](), CompiledModel.loss

    def spying(model: CompiledModel, tokens: torch.Tensor, labels: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.append(tokens)
        return whole(model, tokens, labels, **rest)

    monkeypatch.setattr(CompiledModel, "loss", spying)
    history = train(small(), text, replace(FAST, steps=7, seed=5), progress=lambda p: losses.append(p.loss))
    for step, tokens in enumerate(seen):
        assert torch.equal(tokens, batch(text.train, rows=3, length=17, seed=5, step=step)[0])
    assert len(seen) == 7 and [p.loss for p in history.points[1:]] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 3])


def test_nothing_is_dropped_in_evaluation(text: Text) -> None:
    model = small(dropout=0.5, pattern="*-", mlp={"width": 8}, gdn=None, mamba2=None, moe=None)
    plain = model.eval()(windows(text.valid, rows=2, length=17)[0])
    assert not torch.equal(model.train()(windows(text.valid, rows=2, length=17)[0]), plain)
    assert evaluate(model, text.valid, FAST) == evaluate(model.train(), text.valid, FAST)


def test_the_learning_rate_rises_and_falls() -> None:
    options = Options(steps=100, lr=1.0, warmup=10, floor=0.1)
    rates = [learning_rate(options, Moment(step=i)) for i in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-2) and max(rates) == rates[9]
    assert rates[50] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    timed = replace(options, steps=0, minutes=2.0)
    assert learning_rate(timed, Moment(step=500, seconds=60)) == pytest.approx(0.55)
    assert share(replace(options, minutes=2.0), Moment(step=90, seconds=60)) == pytest.approx(0.9)


def test_time_ends_a_run(text: Text) -> None:
    history = train(small(), text, replace(FAST, steps=0, minutes=0.005, eval_every=1000))
    assert 0.3 <= history.seconds < 5 and history.points[-1].step == history.step > 1


def test_autocast_learns_too(text: Text) -> None:
    model = small()
    history = train(model, text, replace(FAST, steps=40, autocast=True))
    assert history.valid < 4 and all(p.dtype == torch.float32 for p in model.parameters())


# -- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [7, 9])
def test_resuming_gives_the_same_bits(tmp_path: Path, text: Text, killed: int) -> None:
    straight, broken, resumed = small(), small(), small(seed=5)
    want = train(straight, text, FAST)
    with pytest.raises(Killed):
        train(broken, text, FAST, run=tmp_path, progress=dying_at(killed))
    assert latest(tmp_path).name == "step-00000006"
    torch.manual_seed(123)
    found = train(resumed, text, FAST, run=tmp_path, resume=True)
    assert same(bits(straight), bits(resumed)) and not same(bits(straight), bits(small()))
    assert [(p.step, p.loss, p.valid) for p in found.points] == [(p.step, p.loss, p.valid) for p in want.points]
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 4, 8, 10]


def test_the_optimizer_counts(tmp_path: Path, text: Text) -> None:
    """Weights alone are not enough: the same resume with an empty optimizer comes out elsewhere."""
    straight, broken = small(), small()
    train(straight, text, FAST)
    with pytest.raises(Killed):
        train(broken, text, FAST, run=tmp_path, progress=dying_at(7))
    weights = small().load(checkpoint_file(tmp_path))
    train(weights, text, replace(FAST, steps=4))
    assert not same(bits(straight), bits(weights))


def test_a_finished_run_goes_on_when_given_more_steps(tmp_path: Path, text: Text) -> None:
    model = small()
    train(model, text, replace(FAST, steps=3), run=tmp_path)
    assert train(small(), text, replace(FAST, steps=3), run=tmp_path, resume=True).step == 3
    assert train(small(), text, replace(FAST, steps=5), run=tmp_path, resume=True).step == 5
    assert options_of(stored_options(tmp_path)) == replace(FAST, steps=5)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000005"]


def test_a_run_folder_is_not_trained_over(tmp_path: Path, text: Text) -> None:
    train(small(), text, replace(FAST, steps=2), run=tmp_path)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(small(), text, FAST, run=tmp_path)
    clear_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="no checkpoint to continue"):
        train(small(), text, FAST, run=tmp_path, resume=True)


# -- interruptions --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(tmp_path: Path, text: Text, number: int) -> None:
    def press(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), number)

    straight, broken, resumed = small(), small(), small()
    train(straight, text, FAST)
    before = signal.getsignal(number)
    history = train(broken, text, FAST, run=tmp_path, progress=press)
    assert history.interrupted and history.step in (3, 4) and signal.getsignal(number) is before
    train(resumed, text, FAST, run=tmp_path, resume=True)
    assert same(bits(straight), bits(resumed))


@pytest.mark.parametrize("ready", [True, False])
def test_a_second_signal_is_not_caught(ready: bool, request: pytest.FixtureRequest) -> None:
    """Whatever started the tests: a shell has its background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), interrupts(lambda: ready) as asked:
        signal.raise_signal(signal.SIGINT)  # in this thread: one sent to the process may reach another of its threads
        assert ready and asked == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second Ctrl-C went unnoticed")


def test_a_failure_at_any_file_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The k-th write of the second checkpoint fails, before and after it is made, for every k; the old or new one resumes."""
    options = replace(FAST, steps=4, save_every=2, eval_every=2)
    model, first = small(), bits(small())
    train(model, text, options)
    straight, write, found = bits(model), files.write_atomic, set[str]()
    for k in range(6, 11):
        for late in (False, True):
            count, run = [0], tmp_path / f"{k}-{late}"

            def failing(path: Path | str, fill: Any, k: int = k, late: bool = late, count: list[int] = count) -> None:
                count[0] += 1
                if count[0] != k or late:
                    write(path, fill)
                if count[0] == k:
                    raise Killed

            for module in (files, sys.modules["plait.runtime.checkpoint"]):
                monkeypatch.setattr(module, "write_atomic", failing)
            with pytest.raises(Killed):
                model.load_state_dict(first)
                train(model, text, options, run=run)
            monkeypatch.undo()
            found.add(latest(run).name)
            train(model, text, options, run=run, resume=True)
            assert same(straight, bits(model)), (k, late)
    assert found == {"step-00000002", "step-00000004"}


KILLED = """
import os, signal, sys, threading
from pathlib import Path
import torch
from dataclasses import replace
from test_train import FAST, small
from plait.runtime.data import split
from plait.runtime.train import train
text = split(torch.frombuffer(bytearray(b"def f(x): return g(x) + 1\\n" * 80), dtype=torch.uint8), 0.1)
def die(p):
    if p.step == 3:
        threading.Timer(float(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
train(small(), text, replace(FAST, steps=10**6, save_every=1, eval_every=10**5), run=sys.argv[1], progress=die)
"""


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path: Path, text: Text) -> None:
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "0.31"], env=here, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    at = int(latest(tmp_path).name[5:])
    assert at >= 3
    assert train(small(), text, replace(FAST, steps=at + 1), run=tmp_path, resume=True).step == at + 1


# -- what is refused ------------------------------------------------------------------------


def test_another_run_is_not_continued(tmp_path: Path, text: Text) -> None:
    train(small(), text, replace(FAST, steps=2), run=tmp_path)
    with pytest.raises(CheckpointError, match="another spec: it has `hidden = 16`, the model `hidden = 24`"):
        train(small(hidden=24), text, FAST, run=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="in float32, the model is in bfloat16"):
        train(compile(SPEC, dtype="bf16", jit=False), text, FAST, run=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="other text"):
        train(small(), Text(text.train, text.train), FAST, run=tmp_path, resume=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def edit(key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {key: value})) and None


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model.safetensors", flip, "damaged"),
    ("optimizer.safetensors", flip, "damaged"),
    ("optimizer.safetensors", Path.unlink, "cannot be read"),
    ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:100]), "damaged"),
    ("state.json", Path.unlink, "no such file"),
    ("state.json", lambda p: p.write_text(p.read_text()[:99]), "cannot be read"),
    ("state.json", lambda p: p.write_text("[" * 100_000), "cannot be read"),
    ("state.json", lambda p: p.write_bytes(b"\xff\xfe"), "cannot be read"),
    ("state.json", lambda p: p.write_text("[1]"), "no JSON object"),
    ("state.json", edit("step", True), "step is 'True'"),
    ("state.json", edit("step", 7), "at step 7, must be"),
    ("state.json", edit("format", "other"), "'other'"),
    ("state.json", edit("points", [{"step": 1}]), "points do not read"),
    ("state.json", edit("points", [{"step": 1, "seconds": 1, "loss": None, "valid": math.nan}]), "not finite"),
    ("../latest", lambda p: p.write_text("step-0/../../elsewhere"), "must be the name of a checkpoint"),
    ("../latest", lambda p: p.write_text("step-00000009"), "no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "what"), DAMAGE)
def test_a_damaged_folder_is_refused_and_touches_nothing(
    tmp_path: Path, text: Text, name: str, damage: Callable[[Path], Any], what: str
) -> None:
    train(small(), text, replace(FAST, steps=1, warmup=1), run=tmp_path)
    damage(latest(tmp_path) / name)
    model = small(seed=4)
    with pytest.raises(CheckpointError, match=what):
        train(model, text, FAST, run=tmp_path, resume=True)
    assert same(bits(model), bits(small(seed=4)))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"lr": 0.0}, "lr is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"steps": 0}, "both 0"),
        ({"minutes": -1.0}, "minutes is -1"),
        ({"length": 500}, "validation part is 208 bytes"),
    ],
)
def test_options_that_cannot_be(text: Text, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        train(small(), text, replace(FAST, **changes))


def test_stored_options_are_checked() -> None:
    good = {k: getattr(FAST, k) for k in Options.__dataclass_fields__}
    assert options_of(good) == FAST
    for bad in ({"batch": "3"}, {"batch": None}, {"autocast": 1}, {"steps": True}, {"lr": [1]}):
        with pytest.raises(CheckpointError, match=next(iter(bad))):
            options_of(good | bad)


def test_a_loss_that_is_not_finite_ends_the_run(text: Text) -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("embed").fill_(math.inf)
    with pytest.raises(PlaitError, match="the loss is nan at step 0; lower the learning rate"):
        train(model, text, FAST)
