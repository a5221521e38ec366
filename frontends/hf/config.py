"""Reading a config.json so that nothing in it is passed over: what is not honoured is an error that names it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir.errors import SpecError
from ..kinds import MAX_SIZE
from ..problems import refuse, shown, suggest
from ..sequence import MAX_BLOCKS

DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
MAX_NUMBER = 1e30
ACTS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
# What changes no number: names, tokens of the tokenizer, first weights, how others store and run the model.
HARMLESS = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "auto_map", "bos_token_id", "cache_implementation", "chunk_size",
    "classifier_dropout", "cls_token_id", "decoder_start_token_id", "eos_token_id", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_factor", "initializer_range", "is_decoder",
    "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "mamba_chunk_size", "model_type", "num_logits_to_keep",
    "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "rescale_prenorm_residual", "residual_in_fp32", "return_dict", "sep_token_id", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "time_step_floor", "time_step_max", "time_step_rank", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "unk_token_id", "use_cache", "use_mamba_kernels", "mamba_ssm_cache_dtype",
})  # fmt: skip


@dataclass
class Config:
    """The fields of a config, with what has been read of them and what is wrong."""

    fields: Mapping[str, Any]
    used: set[str] = field(default_factory=set[str])
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or its default where it is absent or null."""
        self.used.add(name)
        value = self.fields.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A field that is a number of things, at least one."""
        value = self.get(name, default)
        # Layers and experts are written out one by one before any file is asked whether it has them.
        most = MAX_BLOCKS if name == "n_layer" or name.endswith(("_layers", "experts")) else MAX_SIZE
        if type(value) is int and 1 <= value <= most:
            return value
        what = "missing" if value is None else f"is {shown(value)}"
        raise SpecError(f"config.json: {name}: {what}; must be a whole number from 1 to {most}")

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if type(value) in (int, float) and abs(value) <= MAX_NUMBER:
            return float(value)
        raise SpecError(f"config.json: {name}: is {shown(value)}; must be a number up to {MAX_NUMBER:g}")

    def above(self, name: str, default: float) -> float:
        """A number that is divided by."""
        if (value := self.number(name, default)) > 0:
            return value
        raise SpecError(f"config.json: {name}: is {value:g}; must be above 0")

    def numbers(self, name: str, default: Sequence[float]) -> tuple[float, ...]:
        """A field that is a list of so many numbers; infinity is one."""
        value = self.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != len(default) or not all(type(x) in (int, float) for x in value):
            raise SpecError(f"config.json: {name}: is {shown(value)}; must be a list of {len(default)} numbers")
        return tuple(float(x) if abs(x) <= MAX_NUMBER else math.copysign(math.inf, x) for x in value)

    def table(self, name: str) -> dict[str, Any]:
        """A field that has fields of its own, none where it is absent."""
        value = self.get(name, {})
        if isinstance(value, dict):
            return value
        raise SpecError(f"config.json: {name}: is {shown(value)}; must be an object")

    def listed(self, name: str, default: Sequence[Any], count: int | None = None) -> list[Any]:
        """A field that is a list, of so many where that is known."""
        value = self.get(name, list(default))
        if isinstance(value, list) and count in (None, len(value)):
            return value
        raise SpecError(f"config.json: {name}: is {shown(value)}; must be a list{f' of {count}' if count is not None else ''}")

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if isinstance(value, bool):
            return value
        raise SpecError(f"config.json: {name}: is {shown(value)}; must be true or false")

    def names(self, name: str, count: int, default: list[str], known: tuple[str, ...]) -> list[str]:
        """A field that says what each of `count` layers is."""
        value: Any = self.get(name, default)
        if not isinstance(value, list) or len(value) != count or not all(isinstance(v, str) for v in value):
            raise SpecError(f"config.json: {name}: is {shown(value)}; must be a list of {count} names")
        self.problems += [f"{name}: names {shown(v)}; {suggest(v, known)}" for v in sorted(set(value)) if v not in known]
        return value

    def must(self, name: str, *allowed: Any) -> None:
        """A field that has to be one of these values, or absent."""
        value = self.get(name, allowed[0])
        if value not in allowed or any(isinstance(value, bool) != isinstance(a, bool) for a in allowed if a == value):
            known = " or ".join(shown(a) for a in allowed)
            self.problems.append(f"{name}: is {shown(value)}; {known} is what is supported")

    def idle(self, *names: str) -> None:
        """Fields that another field, or the family, makes say nothing."""
        self.used.update(names)

    def training(self, *names: str) -> None:
        """Dropouts that only training has and that we do not apply: they are told, not passed over."""
        for name in names:
            if self.number(name, 0.0):
                self.notes.append(f"{name} = {self.fields[name]} is not applied in training")

    def act(self, name: str, default: str = "silu") -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in ACTS:
            raise SpecError(f"config.json: {name}: is {shown(value)}; {suggest(value, ACTS)}")
        return ACTS[value]

    def dtype(self) -> str:
        value = self.fields.get("dtype", self.fields.get("torch_dtype")) or "float32"
        self.idle("dtype", "torch_dtype")
        if not isinstance(value, str) or value not in DTYPES:
            raise SpecError(f"config.json: dtype: is {shown(value)}; {suggest(value, DTYPES)}")
        return DTYPES[value]

    def finish(self) -> None:
        """Refuse everything that nobody has read and that may change what the model computes."""
        family = self.fields.get("model_type")
        left = [n for n, v in self.fields.items() if v is not None and n not in self.used and n not in HARMLESS]
        unread = [
            f"{n}: is {shown(self.fields[n])}, which is not honoured for {family}; take it out if it changes nothing"
            for n in left
        ]
        refuse([*self.problems, *unread], "config.json")
        if self.notes:
            warnings.warn(f"config.json: {'; '.join(self.notes)}", stacklevel=2)
