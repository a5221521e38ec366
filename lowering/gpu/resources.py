"""What a compiled kernel uses: registers, spills, tensor cores, and how wide its loads are."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from ...ir import PlaitError
from .aot import Compiled

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+)")
TENSOR_CORE = re.compile(r"HGMMA|QGMMA|IGMMA|HMMA|IMMA|QMMA|OMMA|DMMA|UTC\w*MMA")

PRODUCT = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b([\w.:]*)")  # of PTX
HALF_PRODUCT = re.compile(r"f16|tf32")  # and bf16: what the names below are for
CORES = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA"}
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)")  # to shared memory


@dataclass(frozen=True)
class Resources:
    """Counts of one kernel; instructions as they stand in its code, run once or a thousand times."""

    registers: int
    spills: int  # instructions that store registers to memory or load them back (AMD: registers that are)
    stack: int  # bytes per thread; above zero where registers spill
    shared: int  # bytes per block
    tensor_core: Mapping[str, int]  # instruction -> how many
    loads: int  # from global memory
    wide_loads: int  # of at least 128 bits
    stores: int
    wide_stores: int


def resources(compiled: Compiled) -> Resources:
    """Read from the code itself; no GPU needed."""
    if "cubin" not in compiled.asm:
        return _amd(str(compiled.asm["amdgcn"]), compiled.shared)
    cubin, ptx = compiled.asm["cubin"], str(compiled.asm["ptx"])
    cubin = cubin if isinstance(cubin, bytes) else cubin.encode()
    registers, stack = _usage(_dump(cubin, "--dump-resource-usage"))
    products = PRODUCT.findall(ptx)
    # Disassembling takes a hundred times as long as all else here; PTX has the same loads and products where nothing was added.
    if stack or "cp.async.bulk" in ptx or not all(HALF_PRODUCT.search(rest) for _, rest in products):
        return _nvidia(_dump(cubin, "--dump-sass"), registers, stack, compiled.shared)
    loads, stores = (Counter(re.findall(rf"\b{kind}\.global[\w.]*", ptx)) for kind in ("ld", "st"))
    copies = [int(size, 0) for size in COPY.findall(ptx)]
    cores = Counter(CORES[kind] for kind, _ in products)
    return Resources(
        registers, 0, stack, compiled.shared, dict(sorted(cores.items())), sum(loads.values()) + len(copies),
        _wide_ptx(loads) + sum(size >= 16 for size in copies), sum(stores.values()), _wide_ptx(stores),
    )  # fmt: skip


def _wide_ptx(code: Mapping[str, int]) -> int:
    """`ld.global.v4.b32` and the like: of 128 bits or more."""
    wide = {k: m for k in code if (m := re.search(r"\.v(\d)\.\w(\d+)$", k))}
    return sum(code[k] for k, m in wide.items() if int(m[1]) * int(m[2]) >= 128)


@lru_cache(maxsize=512)
def _dump(cubin: bytes, what: str) -> str:
    """What cuobjdump says of a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise PlaitError(f"resources: cuobjdump, which Triton brings, fails on this kernel: {reason}") from None


def _usage(text: str) -> tuple[int, int]:
    """Registers, and bytes of stack per thread."""
    usage = USAGE.search(text)
    if usage is None:
        raise PlaitError("resources: cuobjdump names no registers for this kernel; its output has a form that is not known")
    return int(usage[1]), int(usage[2])


def _nvidia(text: str, registers: int, stack: int, shared: int) -> Resources:
    code = Counter(INSTRUCTION.findall(text))
    loads = {k: n for k, n in code.items() if re.match(r"LDG(STS)?\b|UTMALDG|UBLKCP", k)}
    stores = {k: n for k, n in code.items() if re.match(r"STG\b|UTMASTG", k)}
    cores = Counter(m for k in code.elements() if (m := k.split(".")[0]) and TENSOR_CORE.fullmatch(m))
    return Resources(
        registers, sum(n for k, n in code.items() if k.startswith(("LDL", "STL"))), stack, shared,
        dict(sorted(cores.items())), sum(loads.values()), _wide(loads), sum(stores.values()), _wide(stores),
    )  # fmt: skip


def _wide(code: Mapping[str, int]) -> int:
    """Of 128 bits or more, which a bulk copy always is."""
    return sum(n for k, n in code.items() if re.search(r"\.(128|256)\b|^UTMA|^UBLKCP|ENL2", k))


def _amd(text: str, shared: int) -> Resources:
    code = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    loads = [k for k in code if re.match(r"(global|buffer|flat)_load_", k)]
    stores = [k for k in code if re.match(r"(global|buffer|flat)_store_", k)]
    cores = Counter("v_mfma" for k in code if k.startswith("v_mfma"))
    return Resources(
        _number(text, "vgpr_count"), _number(text, "vgpr_spill_count"), _number(text, "private_segment_fixed_size"), shared,
        dict(cores), len(loads), _wide_amd(loads), len(stores), _wide_amd(stores),
    )  # fmt: skip


def _wide_amd(code: Iterable[str]) -> int:
    return sum(k.endswith(("dwordx4", "b128")) for k in code)


def _number(text: str, name: str) -> int:
    """One line of the metadata at the end of AMD's assembly."""
    found = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
    if found is None:
        raise PlaitError(f"resources: the assembly names no .{name}; its form is not known")
    return int(found[1])
