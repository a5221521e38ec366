"""The main job in one run: compile a hybrid, watch a layer fuse, train on Python's own library, write some more of it.

    python examples/demo.py [--minutes 4] [--steps N] [--out demo-run] [--preset demo] [--eager]

Writes loss.png, loss.svg and the last checkpoint into the output folder, and nothing anywhere else.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import torch
from plait.api import compile, load, program
from plait.cli_generate import written
from plait.cli_output import count, error_text, note
from plait.cli_progress import training_bar
from plait.ir import Graph, PlaitError, dump
from plait.passes import DEFAULT, Pipeline
from plait.runtime import CompiledModel
from plait.runtime.curve import write_curve
from plait.runtime.data import SKIPPED, Text, bigram_entropy, read_bytes, split
from plait.runtime.rundir import checkpoint_file, clear_run
from plait.runtime.train import History, Options, evaluate, train

LIMIT = 16 * 2**20
RECIPE = Options(batch=8, length=256, lr=3e-3, warmup=30, eval_every=40, eval_rows=32, save_every=200)


def main() -> int:
    """Run the parts in turn; a user's error is one line."""
    asked = arguments()
    try:
        return demo(asked)
    except PlaitError as error:
        note(error_text(error))
        return 1
    except KeyboardInterrupt:
        note("plait: interrupted")
        return 130


def demo(asked: argparse.Namespace) -> int:
    """From a spec to a text."""
    out = Path(asked.out)
    show_fusion(asked.preset)
    text = library()
    model = compile(asked.preset, dtype="f32", jit=not asked.eager)
    history, levels = learn(model, text, asked, out)
    write_curve(history.points, out / "loss", levels)
    if history.interrupted:
        raise KeyboardInterrupt
    print(f"curve       {out / 'loss.png'}, {out / 'loss.svg'}\ncheckpoint  {checkpoint_file(out)}")
    sample(model, text, checkpoint_file(out), asked.bytes)
    return 0


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, compiling not counted (4)")
    parser.add_argument("--steps", type=int, default=0, help="train for so many steps instead")
    parser.add_argument("--out", default="demo-run", help="folder to write into (demo-run)")
    parser.add_argument("--preset", default="demo", help="another preset, or a spec file (demo)")
    parser.add_argument("--bytes", type=int, default=400, help="to generate at the end (400)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile: starts at once, trains slower")
    return parser.parse_args()


def show_fusion(preset: str) -> None:
    """The IR of the first layer as the spec says it, and as it runs."""
    before = program(preset, task="loss", dtype="f32", training=True)
    after = Pipeline.parse(DEFAULT).run(before)
    layer = before.layers[0]
    heading("one layer as written")
    print(dump(layer))
    heading(f"the same layer after {DEFAULT}")
    print(dump(next((g for g in after.layers if g.name == layer.name), after.layers[0])))
    heading(f"in all layers {operations(before)} operations became {operations(after)}, a fused kernel counted as one")


def operations(graph: Graph) -> int:
    """What runs one by one: ops and kernels; a change of shape costs nothing."""
    called = [node.op for node in graph.nodes if isinstance(node.op, Graph) and node.op.role == "layer"]
    return sum(not node.is_op("reshape", "split") for g in (graph, *called) for node in g.nodes) - len(called)


def library() -> Text:
    """Python's own standard library, its tests left out, as text in two parts."""
    root = sysconfig.get_path("stdlib")
    data = read_bytes(root, suffixes=(".py",), skip=(*SKIPPED, "test", "tests", "idle_test"), limit=LIMIT)
    text = split(data)
    heading(f"training text: {count(len(text.train))} bytes of {root}, {count(len(text.valid))} more held back")
    return text


def learn(model: CompiledModel, text: Text, asked: argparse.Namespace, out: Path) -> tuple[History, dict[str, float]]:
    """Train, then say how the result compares with counting."""
    options = replace(RECIPE, steps=asked.steps, minutes=0.0 if asked.steps else asked.minutes)
    clear_run(out)
    start = time.perf_counter()
    with training_bar() as progress:
        history = train(model, text, options, run=out, progress=progress)
    spent, tokens = time.perf_counter() - start, history.step * options.batch * options.length
    counted = bigram_entropy(text.train, text.valid)
    final = evaluate(model, text.valid, options, rows=4 * options.eval_rows)
    weights = count(sum(p.numel() for p in model.parameters()))
    heading(f"{weights} parameters saw {count(tokens)} bytes in {history.step} steps and {spent:.0f} s, compiling included")
    for name, loss in (("this model", final), ("counting pairs", counted.bigram), ("counting bytes", counted.unigram)):
        print(f"{name:15} {loss:.3f} nats per byte of held-back text")
    return history, {"counting bytes": counted.unigram, "counting pairs": counted.bigram}


def sample(trained: CompiledModel, text: Text, checkpoint: Path, length: int) -> None:
    """Read the checkpoint back, see that it computes the same, and let it write."""
    model = load(checkpoint, dtype="f32", mode="infer", jit=False)
    probe = text.valid[None, :100].long()
    with torch.no_grad():
        far = float((model(probe) - trained.eval()(probe)).abs().max())
    heading(f"reloaded {checkpoint.name}: logits within {far:.1e} of the trained model; it goes on from 'def '")
    print("def ", end="")
    for piece in written(model, "def ", length, temperature=0.7, top_k=40, seed=0):
        print(piece, end="", flush=True)
    print()


def heading(text: str) -> None:
    """A line that separates."""
    print(f"\n--- {text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
