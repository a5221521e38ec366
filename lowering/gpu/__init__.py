"""What generated Triton kernels need: sources, an interpreter that checks memory, compiling ahead of time, machines."""

from .aot import Compiled, CompileError, Job, compile_all, compile_kernel
from .interpret import KernelError, run
from .machine import MACHINES, TARGETS, Machine, Target, gpu_target, predicted_seconds
from .resources import Resources, resources
from .sources import cache_dir, load
from .trap import AccessError, Count, Traffic, watch

__all__ = [
    "MACHINES", "TARGETS", "AccessError", "CompileError", "Compiled", "Count", "Job", "KernelError", "Machine", "Resources",
    "Target", "Traffic", "cache_dir", "compile_all", "compile_kernel", "gpu_target", "load", "predicted_seconds", "resources",
    "run", "watch",
]  # fmt: skip
