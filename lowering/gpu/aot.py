"""Compiling Triton kernels ahead of time, without a GPU, into exactly what a launch would compile."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ...ir import PlaitError
from ...ir.trees import TRIES, raced
from .interpret import LOCK
from .machine import find_target, gpu_target

LINES = 12  # of Triton's message that an error shows
WRITES = re.compile(r"\b(st\.global|red\.|atom\.|cp\.(async\.bulk|reduce)|(global|buffer|flat)_(store|atomic))")  # in assembly


class CompileError(PlaitError):
    """A kernel that a target cannot have."""


@dataclass(frozen=True)
class Job:
    """One kernel, what a launch of it would get, and for which target."""

    fn: Any  # a @triton.jit function
    args: Sequence[Any]  # meta tensors will do: only their dtype and alignment count
    meta: Mapping[str, Any]
    target: str
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """Every stage of one kernel for one target."""

    name: str
    target: str
    asm: Mapping[str, str | bytes] = field(repr=False)  # ttir ttgir llir, then ptx cubin or amdgcn hsaco
    shared: int  # bytes
    num_warps: int
    num_stages: int
    signature: Mapping[str, str]  # parameter -> type, `constexpr` where the value is compiled in
    aligned: tuple[str, ...]  # parameters that are known to be multiples of 16


def compile_kernel(
    fn: Any, args: Sequence[Any], meta: Mapping[str, Any], target: str, *, num_warps: int = 4, num_stages: int = 3
) -> Compiled:
    """One kernel for one target, specialised to its arguments as a launch specialises it."""
    with LOCK:
        return _compile(Job(fn, args, meta, target, num_warps, num_stages))


def compile_all(jobs: Sequence[Job]) -> list[Compiled | CompileError]:
    """Every job's outcome, in the order of the jobs."""
    # LLVM's options are the process's: code for one vendor comes out otherwise while another's is compiled beside it.
    vendors = dict.fromkeys(find_target(j.target).backend for j in jobs)
    found = dict[int, Compiled | CompileError]()
    # Threads: most of a compile is LLVM without Python's lock, and ptxas; kernels need not be sent anywhere.
    with LOCK, ThreadPoolExecutor(max(1, min(len(jobs), len(os.sched_getaffinity(0))))) as pool:
        for vendor in vendors:
            mine = [i for i, j in enumerate(jobs) if find_target(j.target).backend == vendor]
            found.update(zip(mine, pool.map(_outcome, [jobs[i] for i in mine]), strict=True))
    return [found[i] for i in range(len(jobs))]


def _outcome(job: Job) -> Compiled | CompileError:
    try:
        return _compile(job)
    except CompileError as error:
        return error


def _compile(job: Job, tries: int = TRIES) -> Compiled:
    from triton.runtime.jit import JITFunction

    if not isinstance(job.fn, JITFunction):
        raise CompileError(
            f"compile: the kernel is a {type(job.fn).__name__}; it must be a @triton.jit function (with TRITON_INTERPRET unset)"
        )
    limit = find_target(job.target).shared
    try:
        made = _made(job)
    except Exception as error:  # whatever Triton, LLVM or ptxas raise about this kernel
        if raced(error) and tries > 1:  # two threads parsed at once, which says nothing of the kernel
            return _compile(job, tries - 1)
        raise CompileError(f"{job.fn.__name__} cannot be compiled for {job.target}:\n{_useful(error)}") from error
    if not WRITES.search(str(made.asm.get("ptx") or made.asm.get("amdgcn"))):
        raise CompileError(f"{made.name} writes nothing: for {job.target} the compiler takes all that it does for unreachable")
    if made.shared > limit:
        raise CompileError(f"{made.name} needs {made.shared} bytes of shared memory; a block of {job.target} has {limit}")
    return made


def _made(job: Job) -> Compiled:
    """What `JITFunction.run` does up to the launch, for a target that is not there."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = gpu_target(job.target)
    backend = make_backend(target)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    bind = create_function_from_signature(job.fn.signature, job.fn.params, backend)
    bound, specialization, rest = bind(*job.args, **job.meta, **options)
    packed, signature, constants, attrs = job.fn._pack_args(backend, {**job.meta, **rest}, bound, specialization, rest)
    source = ASTSource(job.fn, signature, constants, attrs)
    made = triton.compile(source, target=target, options=packed.__dict__)
    aligned = tuple(job.fn.arg_names[k[0]] for k, v in attrs.items() if ["tt.divisibility", 16] in v)
    return Compiled(
        job.fn.__name__, job.target, dict(made.asm), made.metadata.shared, job.num_warps, job.num_stages, signature, aligned
    )


def _useful(error: BaseException) -> str:
    """The last lines of the innermost message: the kernel's line and what is wrong with it."""
    texts = [str(error)]
    while (cause := error.__cause__) is not None:
        error = cause
        texts.append(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    lines = [line for line in "\n".join(dict.fromkeys(texts)).splitlines() if line.strip() and "Repro command" not in line]
    return "\n".join(lines[-LINES:]) or repr(error)
