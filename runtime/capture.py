"""Decoding with states at hand; on a CUDA device the one-token step is recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensor = torch.Tensor
Step = Callable[..., Sequence[Tensor]]  # tokens, at, states -> logits, states
Record = Callable[[Callable[[], object], Callable[[], Tensor]], "tuple[Callable[[], None], Tensor] | None"]
WORTH = 16  # tokens from which recording pays


class Decoder:
    """A cached program and its states: each call takes the next tokens and gives the logits behind the last of them.

    With `record`, the first one-token step runs as it is, which compiles it; the second is recorded over tensors that stay
    where they are, and from then on replayed. A step that waits for the host is never recorded.
    """

    def __init__(
        self, step: Step, states: Sequence[Tensor], record: Record | None = None, carried: Sequence[bool] | None = None
    ) -> None:
        self.step, self.states, self.record = step, list(states), record
        self.carried = [True] * len(self.states) if carried is None else [*carried]  # which states are not made of slots
        self.done, self.single = 0, 0  # tokens, and one-token steps
        self.replay: Callable[[], None] | None = None

    @torch.inference_mode()  # a step has nothing to remember
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [b, vocab]; valid until the next call."""
        alone = tokens.shape[1] == 1
        if alone and self.single == 1 and self.record is not None:
            self._record(tokens, self.record)
        logits = self._replayed(tokens) if alone and self.replay is not None else self._run(tokens)
        self.done, self.single = self.done + tokens.shape[1], self.single + alone
        return logits

    def _run(self, tokens: Tensor) -> Tensor:
        logits, *self.states = self.step(tokens, torch.tensor(self.done, device=tokens.device), *self.states)
        return logits[:, -1]

    def _replayed(self, tokens: Tensor) -> Tensor:
        assert self.replay is not None
        self.tokens.copy_(tokens)
        self.replay()
        return self.logits

    def _record(self, tokens: Tensor, record: Record) -> None:
        """Try to record the step that comes next; nothing of it has happened when this returns."""
        self.tokens, self.at = tokens.clone(), torch.tensor(self.done, device=tokens.device)
        # A step may write its states where they stand. Slots of keys and values it will write again, with the same numbers;
        # what it carries on is tried on copies.
        states = [s.clone() if carried else s for s, carried in zip(self.states, self.carried, strict=True)]
        made = record(lambda: self.step(self.tokens, self.at, *states), self._body)
        if made is not None:
            self.replay, self.logits = made

    def _body(self) -> Tensor:
        """One step, over tensors that stay: states are written where they are."""
        logits, *states = self.step(self.tokens, self.at, *self.states)
        for old, new in zip(self.states, states, strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)
        self.at.add_(1)
        return logits[:, -1]


def recorder(device: torch.device, tokens: int) -> Record | None:
    """What records steps on this device, where that pays for so many tokens."""
    return _cuda_graph if device.type == "cuda" and tokens >= WORTH else None


def _cuda_graph(try_step: Callable[[], object], body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor] | None:
    """The body as a CUDA graph: how to replay it, and its result; None for a step that waits for the host."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        try_step()  # makes what is made once per stream
        free = _runs_free(try_step)
    current.wait_stream(stream)
    if not free:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = body()
    return graph.replay, logits


def _runs_free(try_step: Callable[[], object]) -> bool:
    """Whether the step runs without the host waiting for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        try_step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return True
