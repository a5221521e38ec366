"""Passes: graphs to better graphs."""

from .cache import State, cache_states, with_cache
from .cleanup import canonicalize, cse, dce, simplify
from .differentiate import differentiate
from .fuse import fuse
from .manager import Event, PassFailed, Pipeline, read_reproducer
from .outline import Region, convex, inline, inline_kernels, outline, outline_all, region
from .place import place
from .recompute import recompute
from .registry import NUMERICS, PASSES, Option, Pass, register
from .remarks import Remark
from .residual import carry_residual
from .rewrite import Rule, rewrite
from .rows import outline_rows
from .validate import Report, validate
from .verify import check_types

DEFAULT = "canonicalize,carry-residual,fuse,outline-rows,dce"

__all__ = [
    "DEFAULT", "NUMERICS", "PASSES", "Event", "Option", "Pass", "PassFailed", "Pipeline", "Region", "Remark", "Report",
    "Rule", "State", "cache_states", "canonicalize", "carry_residual", "check_types", "convex", "cse", "dce", "differentiate",
    "fuse", "inline", "inline_kernels", "outline", "outline_all", "outline_rows", "place", "read_reproducer", "recompute",
    "region", "register", "rewrite", "simplify", "validate", "with_cache",
]  # fmt: skip
