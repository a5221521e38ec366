"""Spec in, runnable module out: the whole path in one function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from plait.frontends import ModelSpec, build, dump_spec, load_spec
from plait.ir import CheckpointError, Graph, PlaitError
from plait.lowering import lower
from plait.passes import DEFAULT, Pipeline
from plait.runtime import CompiledModel, Variant, read_metadata

Spec = ModelSpec | str | Path | Mapping[str, Any]
MODES = ("train", "infer")


def as_spec(spec: Spec) -> ModelSpec:
    """A spec from a spec, a preset's name, a file's path, or a mapping of a file's fields."""
    return spec if isinstance(spec, ModelSpec) else load_spec(spec)


def program(spec: Spec, *, task: str = "logits", dtype: str = "", packed: bool = False, training: bool = False) -> Graph:
    """The typed IR of a spec, before any pass; `task` is logits, loss or cached."""
    graph = build(as_spec(spec), task="logits" if task == "cached" else task, dtype=dtype, packed=packed, training=training)
    return Pipeline.parse("with-cache").run(graph) if task == "cached" else graph


def compile(
    spec: Spec,
    *,
    target: str = "cpu",
    dtype: str = "",
    mode: str = "train",
    passes: str = DEFAULT,
    seed: int = 0,
    jit: bool = True,
) -> CompiledModel:
    """Compile a spec to a module: `model(tokens) -> logits`, `model.loss(tokens, labels)`, `model.generate(tokens, n)`.

    Targets: "cpu"; "cuda" runs row kernels in Triton, its weights are made on the CUDA device (without one they stay on the
    CPU, where the same program is torch code); "interpreter" runs the row kernels' Triton source on the CPU, slowly;
    "reference" runs what each op means.

    dtype is that of the weights (the spec's own when empty); mode "infer" turns gradients and dropout off; `passes` is the
    pipeline's text; without `jit` every layer runs eagerly. Raises PlaitError for a spec, target, dtype or pipeline that
    cannot be.
    """
    if mode not in MODES:
        raise PlaitError(f"mode is {mode!r}, must be one of {', '.join(MODES)}")
    if dtype and dtype not in ("f64", "f32", "bf16", "f16"):
        raise PlaitError(f"dtype is {dtype!r}, must be one of f64, f32, bf16, f16")
    known, pipeline = as_spec(spec), Pipeline.parse(passes)

    def make(variant: Variant):
        graph = program(known, task=variant.task, dtype=dtype, packed=variant.packed, training=variant.training)
        return lower(pipeline.run(graph), target=target)

    graph, device = build(known, dtype=dtype), "cuda" if target == "cuda" and torch.cuda.is_available() else "cpu"
    model = CompiledModel(graph, make, description=dump_spec(known), compiled=jit, seed=seed, device=device)
    return model if mode == "train" else model.eval().requires_grad_(False)


def load(path: str | Path, **options: Any) -> CompiledModel:
    """The model in a file written by `save`, compiled with the options of `compile`; its dtype is the file's unless given."""
    found = read_metadata(path)
    text = found.get("spec", "")
    if not text:
        raise CheckpointError(f"{path}: holds no spec, so plait did not write it; compile the spec and call load on the model")
    wanted: dict[str, Any] = {"dtype": found.get("dtype", ""), **options}
    return compile(load_spec(_fields(text, path)), **wanted).load(path)


def _fields(text: str, path: str | Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CheckpointError(f"{path}: its spec does not parse: {error}") from None
