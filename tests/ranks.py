"""A worker module run by several processes, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(
    folder: Path, *command: str, ranks: int = 2, seconds: float = 120.0, env: Mapping[str, str] | None = None
) -> None:
    """Run `python -m command` on every rank; what they say is shown where one fails."""
    env = {**os.environ, **(env or {}), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [(folder / f"rank{r}.log").open("w") for r in range(ranks)]
    started = [
        subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env={**env, "RANK": str(r)}, stdout=log, stderr=log)
        for r, log in enumerate(logs)
    ]
    try:
        codes = [p.wait(timeout=seconds) for p in started]
    finally:
        for p, log in zip(started, logs, strict=True):
            p.kill()
            p.wait()
            log.close()
    assert codes == [0] * ranks, "\n".join((folder / f"rank{r}.log").read_text()[-3000:] for r in range(ranks))
