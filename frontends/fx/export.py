"""An eager module as torch.export sees it: flat, functional, batch and length left symbolic."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from ...ir import PlaitError
from .boundaries import boundaries

Tensor = torch.Tensor
PYTHON = (*vars(operator).values(), math.ceil, math.floor)  # what works out sizes


class TraceError(PlaitError):
    """A module that cannot be turned into a graph."""


@dataclass(frozen=True)
class Exported:
    """A flat program of aten calls, and what it is called with."""

    program: Any  # torch.export.ExportedProgram of a `Call`
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    symbolic: bool
    found: tuple[tuple[str, str], ...]  # eager functions that were met as one op: where, what

    @property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, dict(self.kwargs)))

    @property
    def names(self) -> list[str]:
        """A name for every tensor that the module is given: its argument's."""
        named = [n for n in inspect.signature(self.module.forward).parameters if n != "self"]
        paths = pytree.tree_flatten_with_path((self.args, dict(self.kwargs)))[0]
        return [_shown(path, named) for path, x in paths if isinstance(x, Tensor)]


class Call(torch.nn.Module):
    """A module called as in an example, its tensors alone given: torch.export then sees no other argument."""

    def __init__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self._leaves, self._spec = pytree.tree_flatten((args, dict(kwargs)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self._leaves if isinstance(x, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, Tensor) else x for x in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self.module(*args, **kwargs)


def _shown(path: Any, named: Sequence[str]) -> str:
    """`input_ids` of the first argument, `cache_0` of the first in an argument `cache`."""
    keys: list[Any] = [getattr(k, "key", getattr(k, "idx", "x")) for k in path]
    first = str(named[int(keys[1])]) if keys[0] == 0 and keys[1] < len(named) else str(keys[1])
    return "_".join([first, *map(str, keys[2:])])


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and named arguments: a tensor, a tuple of arguments, or a mapping of named ones."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(cast("Mapping[str, Any]", example))
    if isinstance(example, Sequence) and not isinstance(example, str):
        return tuple(cast("Sequence[Any]", example)), {}
    raise TraceError(f"example is a {type(example).__name__}, must be a tensor, a tuple of arguments or a dict of named ones")


def export(module: torch.nn.Module, example: Any, *, symbolic: bool = True, known: bool = True) -> Exported:
    """Export a module on an example; with `symbolic` the first two dims of what it is given become symbols where they can.

    With `known`, functions whose names say what they compute are one op each.
    """
    if not isinstance(module, torch.nn.Module):  # type: ignore[reportUnnecessaryIsInstance] # a caller's mistake
        raise TraceError(f"module is a {type(module).__name__}, must be an nn.Module")
    args, kwargs = as_call(example)
    if not any(isinstance(x, Tensor) for x in pytree.tree_leaves((args, kwargs))):
        raise TraceError("example holds no tensor; give the inputs that the module is called with")
    call = Call(module, args, kwargs)
    dims = (tuple(map(_dims, call.tensors)),) if symbolic else None
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stack.enter_context(boundaries(module, wanted=known))
            program = torch.export.export(call, call.tensors, dynamic_shapes=dims, strict=False)
            program = program if _is_plain(program) else program.run_decompositions({})
    except PlaitError:
        raise
    except Exception as error:
        raise TraceError(f"{type(module).__name__} cannot be exported: {_why(error)}") from error
    if changed := list(program.graph_signature.buffers_to_mutate.values()):
        raise TraceError(f"{type(module).__name__} changes its buffer {changed[0]} when it runs; a graph has no such effects")
    return Exported(program, module, args, kwargs, symbolic, tuple(dict.fromkeys(found)))


def _is_plain(program: Any) -> bool:
    """Whether nothing in it changes a tensor in place or holds a graph of its own; to make it so takes longer than to trace."""
    calls = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    schemas = [getattr(n.target, "_schema", None) for n in calls]
    plain = all(s is not None or n.target in PYTHON for n, s in zip(calls, schemas, strict=True))
    return plain and not any(s.is_mutable for s in schemas if s is not None)


def _dims(x: Tensor) -> Any:
    """Batch and length; torch keeps as a number what the module needs as a number."""
    return {i: torch.export.Dim.AUTO for i in range(min(2, x.dim())) if x.shape[i] > 1}


def _why(error: Exception) -> str:
    """What torch says, and the line of the user's code that it says it of."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    said = lines[0] if lines else type(error).__name__
    frame, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not any(part in code.co_filename for part in ("/torch/", "/plait/", __file__)) and code.co_name == "forward":
            frame = f" (in {code.co_qualname}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    hint = next((x for x in lines if "Could not guard on data-dependent" in x), "")
    return f"{said[:300]}{f'; {hint[:200]}' if hint and hint != said else ''}{frame}"
