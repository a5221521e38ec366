"""Plait under the call shapes of the golden-case checker: `check.py --target tests.hf_adapter:compile_hf`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plait
import torch
from plait.frontends.hf import hf_tensors
from plait.runtime import CompiledModel, EncoderDecoder, Memory, Variant

Tensor = torch.Tensor
DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


class EagerHF:
    """A folder compiled by Plait, its layers run eagerly: what the programs mean, without waiting for Inductor."""

    jit = False

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self.names: tuple[str, ...] = ()

    def load(self, folder: str | Path) -> CompiledModel:
        golden = Path(folder, "golden.json")
        if golden.exists():  # gradients are wanted under the names of modules, which some families' files do not have
            self.names = tuple(json.loads(golden.read_text())["grad_norm"])
        return plait.compile(folder, dtype=DTYPES[self.dtype], target=self.device, jit=self.jit, mode="train")

    def logits(
        self, m: CompiledModel, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Padding on either side is taken out and put back; positions are those of the real tokens."""
        given = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        with torch.no_grad():
            return m(input_ids, mask=attention_mask, **given)

    def packed_logits(self, m: CompiledModel, ids_flat: Tensor, cu_seqlens: Tensor) -> Tensor:
        with torch.no_grad():
            return m(ids_flat[None], cu_seqlens)[0]

    def loss_and_grads(
        self, m: CompiledModel, inputs: Mapping[str, Tensor], labels: Tensor, shift: bool
    ) -> tuple[float, dict[str, Tensor]]:
        m.zero_grad()
        wanted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1) if shift else labels
        more: dict[str, Any] = {k: v for k, v in inputs.items() if k == "decoder_input_ids"}
        loss = m.loss(inputs["input_ids"], wanted, **more)
        loss.backward()
        grads = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
        return float(loss), dict(hf_tensors(m.origin, grads, self.names))

    def generate(self, m: CompiledModel, prompt: Tensor, n: int) -> Tensor:
        return m.generate(prompt, n)[:, -n:]

    def decode_logits(self, m: CompiledModel, prompt: Tensor, tokens: Tensor) -> Tensor:
        """By the program whose rows are equally long; `continue_logits` goes by that whose rows have their own lengths."""
        steps = Steps(m, prompt.shape[0], prompt.shape[1] + tokens.shape[1])
        if isinstance(m, EncoderDecoder):
            steps = Steps(m, len(prompt), tokens.shape[1], m.encode(prompt))
            prompt = tokens.new_full((len(prompt), 1), m.start)
        made = [steps(prompt)[:, -1]]
        made += [steps(tokens[:, i : i + 1])[:, -1] for i in range(tokens.shape[1] - 1)]
        return torch.stack(made, 1)

    def continue_logits(self, m: CompiledModel, ids: Tensor, split: int) -> Tensor:
        cache = m.eval().cache(len(ids), ids.shape[1])
        with torch.no_grad():
            cache.add([*ids[:, :split]])
            cache.read()
            return m.verify(cache, ids[:, split:])


class compile_hf(EagerHF):  # named as the checker asks for it
    """The same, every layer under torch.compile."""

    jit = True


class Steps:
    """The cached program and its states: each call feeds tokens behind the ones before."""

    def __init__(self, m: CompiledModel, batch: int, length: int, memory: Memory | None = None) -> None:
        self.m, self.states, self.at = m.eval(), m.fresh_states(batch, length), 0
        self.given = [] if memory is None else [memory.lengths, *memory.parts]

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        runner = self.m.runner(Variant("cached"))
        params = [self.m.get_parameter(name) for name in runner.program.parameters]
        inputs: list[Any] = [tokens, *self.given, torch.tensor(self.at), *self.states]
        logits, *self.states = runner(inputs, params)
        self.at += tokens.shape[1]
        return logits


__all__ = ["EagerHF", "Steps", "compile_hf"]
