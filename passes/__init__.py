"""Passes: graphs to better graphs."""

from .balance import balance, imbalance
from .batch import split_batch
from .cache import State, cache_states, with_cache
from .cleanup import canonicalize, cse, dce, simplify
from .differentiate import differentiate
from .exchanges import hoist_exchanges
from .experts import split_experts
from .fuse import fuse
from .manager import Event, PassFailed, Pipeline, read_reproducer
from .merge import merge_exchanges
from .outline import Region, convex, inline, inline_kernels, outline, outline_all, region
from .overlap import overlap
from .place import place, placement
from .raise_ops import join_views, raise_families, raise_family, raise_ops
from .recompute import recompute
from .registry import NUMERICS, PASSES, Option, Pass, register
from .remarks import Remark
from .reorders import move_reorders
from .repeats import flat_name, outline_layers
from .residual import carry_residual
from .rewrite import Rule, rewrite
from .rows import outline_rows
from .stored import fold_orders
from .tensor import split_features
from .validate import Report, validate
from .verify import check_types

DEFAULT = "canonicalize,carry-residual,fuse,outline-rows,dce"

__all__ = [
    "DEFAULT", "NUMERICS", "PASSES", "Event", "Option", "Pass", "PassFailed", "Pipeline", "Region", "Remark", "Report",
    "Rule", "State", "balance", "cache_states", "canonicalize", "carry_residual", "check_types", "convex", "cse", "dce",
    "differentiate", "flat_name", "fold_orders", "fuse", "hoist_exchanges", "imbalance", "inline", "inline_kernels",
    "join_views", "merge_exchanges",
    "move_reorders", "outline", "outline_all", "outline_layers", "outline_rows", "overlap", "place", "placement",
    "raise_families", "raise_family", "raise_ops", "read_reproducer", "recompute",
    "region", "register", "rewrite", "simplify", "split_batch", "split_experts", "split_features", "validate",
    "with_cache",
]  # fmt: skip
