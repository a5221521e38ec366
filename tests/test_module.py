"""The compiled module: same numbers as the references, and an ordinary nn.Module in every way people use one."""

from __future__ import annotations

from pathlib import Path

import plait
import pytest
import torch
from plait.frontends import ModelSpec, load_spec, shrink
from plait.ir import CheckpointError, DataError, PlaitError, evaluate
from plait.runtime import CompiledModel

TINY = ("demo", "qwen3-next-80b-a3b-tiny", "nemotron-3-nano-30b-a3b-tiny", "mamba-2-2.7b-tiny", "llama-3-8b-tiny")


def tokens_for(spec: ModelSpec, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, spec.vocab, (batch, length))


def moved(model: CompiledModel) -> CompiledModel:
    """Weights away from their symmetric first values, so that each of them matters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def reference(model: CompiledModel, spec: ModelSpec, dtype: str, *inputs: torch.Tensor, **options: object) -> torch.Tensor:
    graph = plait.program(spec, dtype=dtype, **options)  # type: ignore[arg-type] # a table of options
    return evaluate(graph, *inputs, params=dict(model.named_parameters()))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("length", [1, 65])
def test_forms_give_the_references_values_and_gradients(name: str, length: int) -> None:
    spec = shrink(load_spec(name))
    model = moved(plait.compile(spec, dtype="f64", jit=False))
    tokens = tokens_for(spec, 2, length)
    torch.testing.assert_close(model(tokens), reference(model, spec, "f64", tokens), rtol=1e-10, atol=1e-10)
    labels = tokens_for(spec, 2, length)
    ours = torch.autograd.grad(model.loss(tokens, labels), list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(
        reference(model, spec, "f64", tokens, labels, task="loss"), list(model.parameters()), allow_unused=True
    )
    for (label, _), a, b in zip(model.named_parameters(), ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, label=label: f"{label}: {m}")


@pytest.mark.parametrize("name", TINY)
def test_packed_segments_are_separate_runs(name: str) -> None:
    spec = shrink(load_spec(name))
    model = moved(plait.compile(spec, dtype="f64", jit=False))
    tokens, cu = tokens_for(spec, 1, 70), torch.tensor([0, 1, 1, 66, 70])
    alone = [model(tokens[:, a:b]) for a, b in ((0, 1), (1, 66), (66, 70))]
    torch.testing.assert_close(model(tokens, cu=cu), torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TINY)
def test_generation_with_state_is_greedy_decoding_without(name: str) -> None:
    spec = shrink(load_spec(name))
    model = moved(plait.compile(spec, dtype="f64", mode="infer", jit=False))
    tokens = tokens_for(spec, 2, 5)
    slow = tokens
    for _ in range(6):
        slow = torch.cat([slow, model(slow)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(tokens, 6), slow)


def test_sampling_is_seeded_and_stops() -> None:
    spec = shrink(load_spec("demo"))
    model = moved(plait.compile(spec, dtype="f32", mode="infer", jit=False))
    tokens = tokens_for(spec, 2, 3)
    a, b, c = (model.generate(tokens, 8, temperature=1.0, top_k=7, seed=s) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    first = int(model.generate(tokens[:1], 1)[0, -1])
    assert model.generate(tokens[:1], 8, stop=first).shape[1] == 4
    assert model.generate(tokens, 0).shape == tokens.shape


def test_it_is_compiled_once_for_every_length() -> None:
    spec = shrink(load_spec("demo"))
    model = plait.compile(spec, dtype="f32")
    eager = plait.compile(spec, dtype="f32", jit=False)
    runner = model.runner(plait.runtime.Variant("loss", training=True))
    graphs = list[list[bool]]()
    for batch, length in ((2, 33), (3, 64), (5, 7), (2, 2), (4, 130)):
        tokens = tokens_for(spec, batch, length)
        loss, wanted = model.loss(tokens), eager.loss(tokens)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        loss.backward()
        codes = [code for layer in runner.entry.children() for known in layer.variants.values() for code in known]
        graphs.append([code is not None for code in codes])
    assert graphs == [[True] * len(runner.program.layers)] * 5


def test_it_learns_in_an_optimizer_loop() -> None:
    spec = shrink(load_spec("demo"))
    model = plait.compile(spec, dtype="f32", jit=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = tokens_for(spec, 2, 17)
    losses = list[float]()
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_state_dict_and_dtype_moves() -> None:
    spec = shrink(load_spec("demo"))
    model, other = (plait.compile(spec, dtype="f32", seed=s, jit=False) for s in (1, 2))
    tokens = tokens_for(spec, 1, 9)
    assert not torch.equal(model(tokens), other(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), other(tokens))
    wide = plait.compile(spec, dtype="f32", seed=1, jit=False).to(torch.float64)(tokens)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), model(tokens), rtol=1e-4, atol=1e-5)


def test_half_precision_and_autocast_stay_near() -> None:
    spec = shrink(load_spec("demo"))
    model = moved(plait.compile(spec, dtype="f32", jit=False))
    tokens = tokens_for(spec, 2, 9)
    wanted = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(tokens)
        model.loss(tokens).backward()
    half = model.to(torch.bfloat16)(tokens)
    for other in (cast, half):
        assert other.dtype == torch.bfloat16
        assert float((other - wanted).norm() / wanted.norm()) < 0.05


def test_export_round_trip(tmp_path: Path) -> None:
    spec = shrink(load_spec("demo"))
    model = moved(plait.compile(spec, dtype="f32", mode="infer"))
    tokens = tokens_for(spec, 2, 9)
    length = torch.export.Dim("s", min=2, max=4096)
    exported = torch.export.export(model, (tokens,), dynamic_shapes={"tokens": {1: length}}, strict=False)
    torch.export.save(exported, tmp_path / "model.pt2")
    back = torch.export.load(tmp_path / "model.pt2").module()
    other = tokens_for(spec, 2, 70)
    eager = plait.compile(spec, dtype="f32", jit=False).load_from(model)
    torch.testing.assert_close(back(other), eager(other), rtol=1e-4, atol=1e-5)


def test_weights_travel_through_a_file(tmp_path: Path) -> None:
    spec = shrink(load_spec("demo"))
    model = moved(plait.compile(spec, dtype="f32", jit=False))
    model.save(tmp_path / "model.safetensors")
    back = plait.load(tmp_path / "model.safetensors", jit=False)
    tokens = tokens_for(spec, 1, 9)
    assert torch.equal(back(tokens), model(tokens))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_checkpoint_that_does_not_fit_is_named_tensor_by_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    spec = shrink(load_spec("demo"))
    model = plait.compile(spec, dtype="f32", jit=False)
    path = tmp_path / "model.safetensors"
    model.save(path)
    tensors = load_file(path)
    tensors["stray"] = torch.zeros(2)
    tensors["embed"] = tensors["embed"][:-1].contiguous()
    del tensors["layers.0.A_log"]
    save_file(tensors, path)
    before = model.state_dict()["layers.0.w_in"].clone()
    with pytest.raises(CheckpointError, match=r"(?s)missing: layers\.0\.A_log.*not in the model: stray.*embed is \[\d+, \d+\]"):
        model.load(path)
    assert torch.equal(before, model.state_dict()["layers.0.w_in"])


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    model = plait.compile(shrink(load_spec("demo")), dtype="f32", jit=False)
    path = tmp_path / "model.safetensors"
    model.save(path)
    whole = path.read_bytes()
    for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="safetensors"):
            model.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        model.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (torch.zeros(3, dtype=torch.int64), r"must be int64 \[batch, length\]"),
        (torch.zeros(1, 3), "must be int64"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one"),
        (torch.zeros(0, 3, dtype=torch.int64), "at least one"),
        (torch.tensor([[1, 10**6]]), "token"),
        (torch.tensor([[1, -1]]), "token"),
    ],
)
def test_tokens_that_cannot_be(tokens: torch.Tensor, why: str) -> None:
    model = plait.compile(shrink(load_spec("demo")), dtype="f32", jit=False)
    with pytest.raises(DataError, match=why):
        model(tokens)


def test_choices_that_cannot_be() -> None:
    for name, value in (("mode", "fast"), ("dtype", "f8"), ("target", "tpu"), ("passes", "fuze")):
        with pytest.raises(PlaitError, match=value if name == "passes" else name):
            plait.compile("demo", jit=False, **{name: value})(torch.ones(1, 2, dtype=torch.int64))
