"""Folders that cannot be: each is one clear error, and nothing is executed, half read or half written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.frontends.hf import load_hf, write_folder
from plait.ir import PlaitError
from safetensors.torch import load_file, save_file

from tests.hf_cases import config
from tests.test_hf_families import folder

Change = Callable[[Path], object]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folder(tmp_path, "llama")


def edit(path: Path, **changes: Any) -> None:
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, **changes}))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def truncated(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def lying(path: Path, **said: Any) -> None:
    """A header that says something else of the first tensor."""
    data = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(n for n in header if n != "__metadata__")
    header[name] |= said
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def linked(path: Path) -> None:
    outside = path.parent / "elsewhere"
    (path / "model.safetensors").rename(outside)
    (path / "model.safetensors").symlink_to(outside)


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def indexed(path: Path, file: str, name: str = "lm_head.weight") -> None:
    places = dict.fromkeys(load_file(path / "model.safetensors"), "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**places, name: file}}))


NAN = torch.full((61, 24), float("nan"))
MISTAKES: list[tuple[Change, tuple[str, ...]]] = [
    (lambda f: edit(f, model_type="lama"), ("model_type: is 'lama'", "did you mean 'llama'")),
    (lambda f: edit(f, model_type=None), ("model_type",)),
    (lambda f: edit(f, hidden_size=-3), ("hidden_size: is -3", "from 1 to")),
    (lambda f: edit(f, hidden_size="24"), ("hidden_size: is '24'",)),
    (lambda f: edit(f, num_attention_heads=10**12), ("num_attention_heads", "from 1 to")),
    (lambda f: edit(f, num_key_value_heads=3), ("kv_heads: is 3", "heads = 4")),
    (lambda f: edit(f, hidden_act="mish"), ("hidden_act: is 'mish'",)),
    (lambda f: edit(f, alibi=True, clip_qkv=8.0), ("alibi: is True", "clip_qkv: is 8.0", "not honoured for llama")),
    (lambda f: edit(f, quantization_config={"bits": 4}), ("quantization_config", "not honoured")),
    (lambda f: edit(f, rope_scaling={"type": "ntk", "factor": 2.0}), ("rope_type is 'ntk'",)),
    (lambda f: edit(f, rope_parameters={"rope_type": "default", "mscale": 2.0}), ("mscale is 2.0",)),
    (lambda f: edit(f, dtype="int8"), ("dtype: is 'int8'",)),
    (lambda f: (f / "config.json").write_text('{"model_type": "llama", "model_type": "gpt2"}'), ("given twice",)),
    (lambda f: (f / "config.json").write_text("{"), ("does not parse",)),
    (lambda f: (f / "config.json").write_text("[]"), ("must be an object",)),
    (truncated, ("cut short",)),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), ("cut short, or no safetensors",)),
    (lambda f: (f / "model.safetensors").write_bytes(b""), ("is 0 bytes",)),
    (lambda f: lying(f, shape=[10**9, 10**9]), ("the header lies",)),
    (lambda f: lying(f, shape=[-1, 4]), ("must have a dtype, shape and data_offsets",)),
    (lambda f: lying(f, data_offsets=[0, 4]), ("the header lies",)),
    (lambda f: lying(f, dtype="F7"), ("must have a dtype",)),
    (lambda f: rewrite(f, lambda t: t.pop("lm_head.weight")), ("lm_head.weight: missing; must be [61, 24]",)),
    (lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), ("extra: is in the file, but no parameter",)),
    (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": torch.ones(24, 61), "x": torch.ones(1)})),
        ("lm_head.weight: is [24, 61], must be [61, 24]", "x: is in the file"),
    ),
    (lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)})), ("is I8, must be",)),
    (lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": NAN})), ("lm_head.weight holds NaN",)),
    (linked, ("link out of the folder",)),
    (pickled, ("pytorch_model.bin", "pickles run code and are never read")),
    (lambda f: (f / "model.safetensors").unlink(), ("there is none",)),
    (lambda f: indexed(f, "../elsewhere.safetensors"), ("no plain file name",)),
    (lambda f: indexed(f, "gone.safetensors"), ("there is no such file",)),
    (lambda f: indexed(f, "model.safetensors", "ghost"), ("'ghost' is in the index, but not in",)),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), MISTAKES)
def test_a_mistake_is_one_clear_error(change: Change, said: tuple[str, ...], llama: Path) -> None:
    change(llama)
    with pytest.raises(PlaitError) as error:
        dict(load_hf(llama)[1])
    assert all(words in str(error.value) for words in said), str(error.value)
    with pytest.raises(PlaitError):
        plait.compile(llama)


def test_a_tied_head_may_stand_twice_if_it_is_the_same(tmp_path: Path) -> None:
    path = folder(tmp_path, "llama_tied")
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(path, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert "head" not in load_hf(path)[1]
    rewrite(path, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(PlaitError, match=r"tied to the embedding, but lm_head\.weight differs"):
        load_hf(path)


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    spec, weights = load_hf(folder(tmp_path, "qwen3_next"))
    write_folder(tmp_path / "shards", config("qwen3_next"), dict(weights), shard=9000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 3
    other, same = load_hf(tmp_path / "shards")
    assert other == spec
    assert all(torch.equal(same[n], weights[n]) for n in weights)


def test_nothing_is_written_over_or_half(llama: Path, tmp_path: Path) -> None:
    model = plait.compile(llama, jit=False)
    with pytest.raises(PlaitError, match="is there already"):
        plait.save_hf(model, llama)
    with pytest.raises(PlaitError, match="differ in the parameters"):
        write_folder(tmp_path / "new", config("llama"), {"embed": torch.ones(61, 24)})
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaitError, match="cannot be written"):
        plait.save_hf(model, tmp_path / "file" / "new")
    with pytest.raises(PlaitError, match="did not come from a Hugging Face folder"):
        plait.save_hf(plait.compile("demo", jit=False), tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "llama"]


def test_weights_are_views_of_the_file_where_they_can_be(llama: Path) -> None:
    """A parameter is changed without the file being changed, and files let go of what has been copied."""
    model = plait.compile(llama, jit=False)
    before = (llama / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (llama / "model.safetensors").read_bytes() == before


def test_links_of_the_hub_cache_belong_to_the_folder(llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(llama.iterdir()):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert load_hf(snapshot)[0].vocab == 61


def test_dropouts_of_training_alone_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="attention_dropout = 0.1 is not applied in training"):
        load_hf(folder(tmp_path, "llama", attention_dropout=0.1))
