"""The noun of the compiler: types, ops, graphs, their text, and what they mean."""

from . import ops, ways
from .dump import dump
from .errors import CheckpointError, DataError, ParseError, PassError, PlacementError, PlaitError, SpecError, TypeMismatch
from .graph import Builder, Graph, Node, Replay, Value, check_name, each_layer, parameters, retype, trace
from .init import ONES, ZEROS, Init, fill
from .interp import arranged, evaluate, gather, natural, scatter, simulate
from .mesh import mesh_text, parse_mesh
from .op import OPS, REQUIRED, OpDef, op
from .parse import parse, parse_statements, parse_type
from .statement import Stmt, Var
from .types import DTYPES, Dim, Mesh, TensorType, tensor_type
from .vjp import pullback, reads

__all__ = [
    "DTYPES", "ONES", "OPS", "REQUIRED", "ZEROS", "Builder", "CheckpointError", "DataError", "Dim", "Graph", "Init", "Mesh",
    "Node", "OpDef", "ParseError", "PassError", "PlacementError", "PlaitError", "Replay", "SpecError", "Stmt", "TensorType",
    "TypeMismatch", "Value", "Var", "arranged", "check_name", "dump", "each_layer", "evaluate", "fill", "gather", "mesh_text",
    "natural", "op", "ops", "parameters", "parse", "parse_mesh", "parse_statements", "parse_type", "pullback", "reads",
    "retype", "scatter", "simulate", "tensor_type", "trace", "ways",
]  # fmt: skip
