"""Spec in, runnable module out: the whole path in one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import torch
from plait.frontends import ModelSpec, build, dump_spec, load_spec, ways_of
from plait.frontends.hf import is_folder, load_hf, read_config, write_folder
from plait.ir import CheckpointError, Graph, PlaitError, parse_mesh
from plait.lowering import Program, begin_building, lower
from plait.passes import DEFAULT, Pipeline, placement
from plait.runtime import CompiledModel, EncoderDecoder, Variant, read_metadata
from plait.runtime.caches import meant_length
from plait.runtime.layout import layout_of
from plait.runtime.mesh import here, together, within
from plait.runtime.module import shifted
from plait.runtime.placed import Batch, PlacedModel
from plait.runtime.traced import TracedModel
from plait.tracing import Traced, compile_traced

Spec = ModelSpec | str | Path | Mapping[str, Any]
MODES = ("train", "infer")
CACHED = {"cached": (), "rows": ("rows=true",), "paged": ("rows=true", "paged=true")}  # what with-cache is told


def as_spec(spec: Spec) -> ModelSpec:
    """A spec from a spec, a preset's name, a file's path, or a mapping of a file's fields."""
    return spec if isinstance(spec, ModelSpec) else load_spec(spec)


def program(
    spec: Spec, *, task: str = "logits", dtype: str = "", packed: bool = False, training: bool = False, last: bool = False
) -> Graph:
    """The typed IR of a spec, before any pass; `task` is logits, loss, or with states: cached, rows or paged.

    With `last`, a program with states gives the logits behind each row's last token alone.
    """
    known, told = as_spec(spec), CACHED.get(task)
    if told is None:
        return build(known, task=task, dtype=dtype, packed=packed, training=training)
    # What an encoder made is read once, and given from then on.
    graph = build(known, task="reply" if known.encoder else "logits", dtype=dtype, packed=packed, training=training)
    options = " ".join([*told, *(["last=true"] if last else [])])
    return Pipeline.parse(f"with-cache{{{options}}}").run(graph)


@overload
def compile(spec: Traced, *, target: str = "cpu", passes: str = DEFAULT, jit: bool = True) -> TracedModel: ...
@overload
def compile(
    spec: Spec, *, target: str = "cpu", dtype: str = "", mode: str = "train", passes: str = DEFAULT, seed: int = 0,
    jit: bool = True, mesh: str = "", place: str = "",
) -> CompiledModel: ...  # fmt: skip
def compile(
    spec: Spec | Traced, *, target: str = "cpu", dtype: str = "", mode: str = "train", passes: str = DEFAULT, seed: int = 0,
    jit: bool = True, mesh: str = "", place: str = "",
) -> CompiledModel | TracedModel:  # fmt: skip
    """Compile a spec to a module: `model(tokens) -> logits`, `model.loss(tokens, labels)`, `model.generate(tokens, n)`.

    A spec is a preset's name, a file, a mapping, or a Hugging Face folder, whose weights the model then has. What
    `trace_module` made of an eager module becomes a module that is called as that one is, with its own weights.

    Targets: "cpu"; "cuda" runs row kernels in Triton, its weights are made on the CUDA device (without one they stay on the
    CPU, where the same program is torch code); "interpreter" runs the row kernels' Triton source on the CPU, slowly;
    "reference" runs what each op means.

    dtype is that of the weights (the spec's own when empty); mode "infer" turns gradients and dropout off; `passes` is the
    pipeline's text; without `jit` every layer runs eagerly. Raises PlaitError for what cannot be.

    `mesh`, such as "cp=2", splits the model over processes that have joined a mesh with these axes (`plait.init`); `place` are
    the options of the pass that does it, such as "attention=ring". Every process calls the model, with the same batch.
    """
    wish = Wish(target, dtype, mode, passes, mesh, place)
    if isinstance(spec, Traced):
        return _of_module(spec, wish, jit)
    with together(here()) if mesh else nullcontext():
        source = spec
        spec, weights, origin = _opened(spec)
        known, make, graph = _prepared(spec, wish, jit)
    device = "cuda" if target == "cuda" and torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"compiled": jit, "seed": seed, "device": device, "weights": weights}
    if mesh:
        with together(here(), {"spec": dump_spec(known), "seed": str(seed), **asdict(wish)}):
            layout = layout_of(_placed(known, graph, wish), here(), within(here(), parse_mesh(mesh)))
        model = PlacedModel(graph, make, layout, description=dump_spec(known), **options)
    elif known.encoder:
        tokens = {"start": known.encoder.start, "pad": known.encoder.pad}
        model = EncoderDecoder(graph, make, description=dump_spec(known), **tokens, **options)
    else:
        model = CompiledModel(graph, make, description=dump_spec(known), **options)
    model.meant = meant_length(graph, known.max_length)
    model.origin, model.home = origin, Path(source) if origin and isinstance(source, (str, Path)) else None
    return model if mode == "train" else model.eval().requires_grad_(False)


def _of_module(traced: Traced, wish: Wish, jit: bool) -> TracedModel:
    """A traced module has its own weights, dtype and mode, and is in one process."""
    asked = {"dtype": wish.dtype, "mode": wish.mode if wish.mode != "train" else "", "mesh": wish.mesh, "place": wish.place}
    if odd := next((k for k, v in asked.items() if v), ""):
        raise PlaitError(f"{odd} is {asked[odd]!r}, but a traced module keeps its own weights and mode; leave {odd} out")
    return compile_traced(traced, target=wish.target, passes=wish.passes, jit=jit)


def _opened(spec: Spec) -> tuple[Spec, Mapping[str, torch.Tensor] | None, Mapping[str, Any]]:
    """A folder's spec, weights and config; of anything else just what it is."""
    if not is_folder(spec):
        return spec, None, {}
    assert isinstance(spec, (str, Path))
    return *load_hf(spec), read_config(spec)


def save_hf(model: CompiledModel, folder: str | Path, like: str | Path = "") -> None:
    """Write a model as a Hugging Face folder: config.json and safetensors, whole or not at all, where nothing is yet.

    The config is that of the folder the model was compiled from, or of the folder `like`, and so are a tokenizer's files.
    """
    config = read_config(like) if like else model.origin
    if not config:
        raise CheckpointError("the model did not come from a Hugging Face folder; say whose config it has: like='folder'")
    if isinstance(model, PlacedModel):
        raise CheckpointError("the model is split over a mesh; save its weights whole and load them into one process first")
    write_folder(Path(folder), config, dict(model.named_parameters()), like=Path(like) if like else model.home)


@dataclass(frozen=True)
class Wish:
    """How a spec is to be compiled."""

    target: str
    dtype: str
    mode: str
    passes: str
    mesh: str
    place: str


def _prepared(spec: Spec, wish: Wish, jit: bool = True) -> tuple[ModelSpec, Callable[[Variant], Program], Graph]:
    """The spec, what makes its programs, and the program before any pass."""
    if wish.mode not in MODES:
        raise PlaitError(f"mode is {wish.mode!r}, must be one of {', '.join(MODES)}")
    if wish.dtype and wish.dtype not in ("f64", "f32", "bf16", "f16"):
        raise PlaitError(f"dtype is {wish.dtype!r}, must be one of f64, f32, bf16, f16")
    if wish.place and not wish.mesh:
        raise PlaitError(f"place is {wish.place!r}, but no mesh is given; give one, such as mesh='cp=2'")
    known = as_spec(spec)
    if wish.mesh and known.encoder:
        raise PlaitError(
            f"mesh is {wish.mesh!r}, but {known.name} has an encoder, and ranks share batches of one sequence a row alone; "
            "leave mesh out, and wrap the model in DistributedDataParallel"
        )
    first = placed_text(known, wish)
    pipeline = Pipeline.parse(",".join(text for text in (first, wish.passes) if text.strip()))

    def make(variant: Variant) -> Program:
        graph = program(
            known, task=variant.task, dtype=wish.dtype, packed=variant.packed, training=variant.training, last=variant.last
        )
        graph, mesh = pipeline.run(graph), parse_mesh(wish.mesh) if wish.mesh else None
        if jit and wish.target == "cpu" and mesh is None:
            begin_building(graph, gradients=wish.mode == "train")
        return lower(graph, target=wish.target, mesh=mesh, eager=not jit)

    return known, make, build(known, dtype=wish.dtype)


def _placed(known: ModelSpec, graph: Graph, wish: Wish) -> Graph:
    return Pipeline.parse(placed_text(known, wish)).run(graph)


def placed_text(spec: ModelSpec, wish: Wish) -> str:
    """The stages that split a program over a mesh, with the ways that the spec asks for; empty where there is none."""
    return placement(wish.mesh, wish.place, ways_of(spec)) if wish.mesh else ""


def shard_batch(
    model: CompiledModel, tokens: torch.Tensor, labels: torch.Tensor | None = None, cu: torch.Tensor | None = None
) -> Batch:
    """This rank's part of a batch that every rank has whole, to be given as `model.loss(*batch, local=True)`.

    Tokens are split and put in order as the model's program wants them; without labels each token's next one is it. The part
    of a model in one process is all of it.
    """
    if isinstance(model, PlacedModel):
        return model.shard(tokens, labels, cu)
    return Batch(tokens, shifted(tokens, cu) if labels is None else labels, cu)


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
