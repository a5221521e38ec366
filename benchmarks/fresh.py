"""What only a fresh process can tell: compile time (cold, then warm) and the peak memory of a training step."""

from __future__ import annotations

import argparse
import compileall
import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measure import read_clock

# The directories that hold compiled code; each cold start gets empty ones.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PLAIT_CACHE_DIR", "XDG_CACHE_HOME")


def cold_and_warm(side: str, name: str, tokens: int, layers: int = 4, mode: str = "fwd+bwd") -> dict[str, Any]:
    """Compile seconds in a new process with empty caches, and in another one after it with the caches it left."""
    with tempfile.TemporaryDirectory() as root:
        first = _spawn("time", side, name, tokens, layers, mode, root)
        again = _spawn("time", side, name, tokens, layers, mode, root)
    failed = first.get("missing") or again.get("missing")
    return {"missing": failed} if failed else {"cold": first, "warm": again}


def peak_memory(side: str, name: str, tokens: int, layers: int = 4) -> dict[str, Any]:
    """MiB that a training step adds at its peak over the process that holds the weights."""
    return _spawn("memory", side, name, tokens, layers, "fwd+bwd", None)


def _spawn(what: str, side: str, name: str, tokens: int, layers: int, mode: str, root: str | None) -> dict[str, Any]:
    command = [sys.executable, __file__, what, side, name, str(tokens), str(layers), mode]
    env, before, children = environment(root), read_clock(), _children()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"missing": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    after = read_clock()
    others = (after.busy - before.busy) - (_children() - children)
    return json.loads(done.stdout.splitlines()[-1]) | {"others": max(0.0, others / (after.wall - before.wall))}


def environment(root: str | None) -> dict[str, str]:
    """What a fresh process is told: caches of its own under `root`, and our bytecode as an installed package has it."""
    _compile_bytecode()
    caches = {} if root is None else {variable: str(Path(root) / variable.lower()) for variable in CACHES}
    return {**os.environ, **caches, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@cache
def _compile_bytecode() -> None:
    compileall.compile_dir(Path(__file__).parents[1], quiet=2, rx=re.compile(r"/\.|/tests/"))


def _children() -> float:
    """CPU seconds of the processes we started and saw end."""
    times = os.times()
    return times.children_user + times.children_system


def quiet(times: dict[str, Any]) -> bool:
    """No process's time was shared: others used less than a quarter of a core meanwhile."""
    return all(times[which]["others"] < 0.25 for which in ("cold", "warm") if which in times)


def _steps(side: str, name: str, tokens: int, layers: int, mode: str) -> Callable[[], Callable[[], object]]:
    """Builds the model of one side; the result runs its step."""
    import cases
    import ours
    import peers

    ids = torch.randint(0, peers.VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    step = cases.forward if mode == "fwd" else cases.train

    def build() -> Callable[[], object]:
        if side == "ours":
            module: Any = ours.model(name, "f32", "infer" if mode == "fwd" else "train", layers)
            if isinstance(module, ours.Missing):
                sys.exit(module.reason)
            return lambda: step(module, module if mode == "fwd" else cases.next_tokens(module), ids)
        peer = peers.build(name, "f32", layers)
        shown: Any = peers.mask_free(peer) if side == "no mask" else peer
        call = shown if side == "eager" else torch.compile(shown, dynamic=False)
        return lambda: step(peer, call, ids)

    return build


def measure_time(build: Callable[[], Callable[[], object]]) -> dict[str, float]:
    """Seconds to build, of the first step, and of a step after that: compiling is the first step less a later one."""
    start = time.perf_counter()
    step = build()
    built = time.perf_counter()
    step()
    first = time.perf_counter()
    step()
    later = time.perf_counter() - first
    return {"build": built - start, "first": first - built, "later": later, "compile": max(0.0, first - built - later)}


def measure_memory(build: Callable[[], Callable[[], object]]) -> dict[str, float]:
    """MiB of resident memory over the weights, at the peak of the second step: the first one also compiles."""
    step = build()
    step()
    _release()
    base = _status("VmRSS")
    # Where the high-water mark cannot be put back, the process's own maximum stands in, compiler included.
    if not _reset_high_water():
        step()
        return {"base": base, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base}
    step()
    return {"base": base, "peak": _status("VmHWM") - base}


def _release() -> None:
    """Gives freed memory back, so that the step starts from the weights alone."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> float:
    """A size in MiB from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def main() -> None:
    """Runs one measurement and prints it as the last line of the output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("side", choices=["eager", "compile", "no mask", "ours"])
    parser.add_argument("model")
    parser.add_argument("tokens", type=int)
    parser.add_argument("layers", type=int)
    parser.add_argument("mode", choices=["fwd", "fwd+bwd"])
    args = parser.parse_args()
    build = _steps(args.side, args.model, args.tokens, args.layers, args.mode)
    print(json.dumps((measure_time if args.what == "time" else measure_memory)(build)))


if __name__ == "__main__":
    main()
