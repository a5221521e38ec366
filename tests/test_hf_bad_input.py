"""Folders and prompts that are wrong in every way: an error of ours; nothing is executed, and nothing half-written."""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.frontends.hf import FAMILIES, load_hf, read_plan
from plait.frontends.hf.config import Config
from plait.frontends.hf.tensors import read_header
from plait.ir import DataError, PlaitError
from plait.runtime import CompiledModel
from safetensors.torch import load_file, save_file

from tests.hf_cases import config, tokens
from tests.test_hf_families import folder

Bytes = Callable[[bytes], bytes]
SINGLE = "model.safetensors"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folder(tmp_path, "llama")


def everything(place: Path) -> dict[str, bytes | str]:
    """Every file and link there, with what is in it."""
    paths = sorted(p for p in place.rglob("*") if p.is_symlink() or p.is_file())
    return {str(p.relative_to(place)): str(p.readlink()) if p.is_symlink() else p.read_bytes() for p in paths}


def refused(source: Path, *said: str) -> None:
    """Loading and compiling end in an error of ours that says this; no file comes, goes or changes, none is imported."""
    before = everything(source.parent)
    for use in (lambda: dict(load_hf(source)[1]), lambda: plait.compile(source, jit=False)):
        with pytest.raises(PlaitError) as error:
            use()
        assert all(words in str(error.value) for words in said), str(error.value)
        assert len(str(error.value)) < 6000
    assert everything(source.parent) == before
    assert not [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith(str(source))]


# -- files that are cut short, or lie -----------------------------------------------------


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def said_of(name: str, **changes: Any) -> Bytes:
    def change(data: bytes) -> bytes:
        header, body = parts(data)
        header[name] |= changes
        return joined(header, body)

    return change


def moved(name: str, by: int, grown: int = 0) -> Bytes:
    """A tensor that begins elsewhere and has as many bytes as before."""

    def change(data: bytes) -> bytes:
        begin, end = parts(data)[0][name]["data_offsets"]
        return said_of(name, data_offsets=[begin + by, end + by + grown])(data)

    return change


NORM = "model.norm.weight"
LIES: list[tuple[str, Bytes, str]] = [
    ("behind the end", moved(NORM, 10**9), "the header lies: 'model.norm.weight' begins at byte"),
    ("overlapping", moved(NORM, -4), "the header lies"),
    ("backwards", said_of(NORM, data_offsets=[96, 0]), "the header lies"),
    ("negative", said_of(NORM, data_offsets=[-96, 0]), "must have a dtype, shape and data_offsets"),
    ("no numbers", said_of(NORM, data_offsets=["0", "96"]), "must have a dtype, shape and data_offsets"),
    ("true", said_of(NORM, shape=[True]), "must have a dtype, shape and data_offsets"),
    ("halves", said_of(NORM, shape=[24.0]), "must have a dtype, shape and data_offsets"),
    ("too wide", said_of(NORM, dtype="F64"), "is F64[24], which is not the 96 bytes"),
    ("another type of that size", said_of(NORM, dtype="I32"), "model.norm.weight: is I32, must be one of"),
    ("more numbers than can be", said_of(NORM, shape=[2**61, 2**61]), "the header lies"),
    ("an unknown type", said_of(NORM, dtype=["F32"]), "must have a dtype"),
    ("a byte more", lambda d: d + b"x", "cut short or has more in it"),
    ("a gap", lambda d: joined(parts(d)[0], b"x" + parts(d)[1]), "cut short or has more in it"),
    ("a huge header", lambda d: struct.pack("<Q", 2**63) + d[8:], "a header of 9223372036854775808; it is cut short"),
    ("a long header", lambda d: struct.pack("<Q", len(d) - 7) + d[8:], "it is cut short, or no safetensors"),
    ("no text", lambda d: joined(b"\xff\xfe{}", b""), "its header does not parse"),
    ("no end", lambda d: joined(b"[" * 200_000, b""), "its header does not parse"),
    ("a list", lambda d: joined([], b""), "must be an object"),
    ("a name twice", lambda d: joined(b'{"a": 1, "a": 2}', b""), "a name stands twice"),
    ("a name alone", lambda d: joined({"a": None}, b""), "is described as None"),
    ("a pickle", lambda d: b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.", "it is cut short, or no safetensors"),
    ("a zip", lambda d: b"PK\x03\x04" + bytes(60), "it is cut short, or no safetensors"),
]


@pytest.mark.parametrize(("change", "said"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_header_that_lies_is_refused(change: Bytes, said: str, llama: Path) -> None:
    file = llama / SINGLE
    file.write_bytes(change(file.read_bytes()))
    refused(llama, SINGLE if "must be one of" not in said else "", said)


def test_a_file_cut_anywhere_is_refused(llama: Path) -> None:
    """A head of a file is never a file, and a mapped tensor never ends behind it."""
    data = (llama / SINGLE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    for end in (0, 1, 7, 8, 9, size, 8 + size, 9 + size, len(data) // 2, len(data) - 4, len(data) - 1):
        (llama / SINGLE).write_bytes(data[:end])
        with pytest.raises(PlaitError, match=r"cut short|does not parse"):
            load_hf(llama)


def test_headers_with_noise_in_them_are_read_or_refused(llama: Path) -> None:
    """Bytes of the header changed at random: an error of ours, or a header whose tensors lie within the file."""
    data, rng, refusals = (llama / SINGLE).read_bytes(), random.Random(0), 0
    size = int.from_bytes(data[:8], "little")
    for _ in range(400):
        noisy = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            noisy[rng.randrange(8 + size)] = rng.choice([rng.randrange(256), *b'0123456789"[]{},:-'])
        (llama / SINGLE).write_bytes(noisy)
        try:
            assert all(0 <= e.begin <= e.end <= len(data) for e in read_header(llama / SINGLE).values())
        except PlaitError:
            refusals += 1
    assert refusals > 200


# -- configs ------------------------------------------------------------------------------

NONSENSE: list[Any] = [
    0, -1, 3, 9999, 2**20, 10**12, 10**400, 1.5, 1e308, float("inf"), True, "", "x", [], [1], ["x", "y"], {}, {"a": 1}, [[]],
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_next", "nemotron_h", "deepseek_v3", "falcon_h1", "gemma3_text", "t5"])
def test_nonsense_in_a_config_is_a_spec_or_an_error_of_ours(name: str) -> None:
    """Every field that the family reads, with every nonsense; none costs time or memory, however large a number it says."""
    fields, refusals = config(name), 0
    read = Config(fields)
    FAMILIES[fields["model_type"]](read)
    for field in sorted({*fields, *read.used}):
        for value in NONSENSE:
            try:
                read_plan({**fields, field: value})
            except PlaitError as error:
                refusals += 1
                assert len(str(error)) < 6000
    assert refusals > 8 * len(fields)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: is 1000000; must be a whole number from 1 to 10000"),
        ({"hidden_size": 0}, "hidden_size: is 0; must be a whole number from 1"),
        ({"vocab_size": 10**12}, "vocab_size: is 1000000000000"),
        ({"intermediate_size": 2**29}, "must be [536870912, 24]"),
        ({"num_attention_heads": 10**9}, "heads: makes heads * head_dim"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps: is 'tiny'"),
        ({"max_position_embeddings": -5}, "max_position_embeddings: is -5"),
    ],
)
def test_sizes_that_the_files_do_not_have_are_refused(changes: dict[str, Any], said: str, llama: Path) -> None:
    """Before anything of that size is made."""
    fields = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**fields, **changes}))
    refused(llama, said)


def test_a_huge_config_is_not_parsed(llama: Path) -> None:
    (llama / "config.json").write_text(" " * 2**22 + "{}")
    refused(llama, "larger than 4194304 bytes")


# -- weights that are no numbers ----------------------------------------------------------


def test_nan_names_every_tensor_that_has_one(llama: Path) -> None:
    held = load_file(llama / SINGLE)
    for name, place in (
        ("model.layers.1.mlp.up_proj.weight", (3, 5)),
        (NORM, (23,)),
        ("model.layers.0.self_attn.k_proj.bias", (0,)),
    ):
        held[name][place] = float("nan")
    save_file(held, llama / SINGLE)
    refused(llama, "model.layers.0.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.weight", NORM, "holds NaN")


# -- what runs, and what leads out --------------------------------------------------------

RUNS = "import pathlib; pathlib.Path({ran!r}).write_text('ran')"


def pickle(ran: Path) -> bytes:
    return f"cpathlib\nPath.touch\n(cpathlib\nPath\n(S'{ran}'\ntRtR.".encode()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.pth"])
def test_a_pickle_is_never_read(name: str, llama: Path) -> None:
    (llama / SINGLE).unlink()
    (llama / name).write_bytes(pickle(llama / "ran"))
    refused(llama, name, "pickles run code and are never read")


def test_an_index_may_not_name_a_pickle(llama: Path) -> None:
    places = dict.fromkeys(load_file(llama / SINGLE), "pytorch_model.bin")
    (llama / SINGLE).unlink()
    (llama / "pytorch_model.bin").write_bytes(pickle(llama / "ran"))
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(llama, "pytorch_model.bin", "no safetensors")


def test_code_in_a_folder_is_not_run(llama: Path) -> None:
    """`auto_map` names code; it is read past, and the family's own reading holds."""
    for module in ("modeling_x.py", "configuration_x.py", "__init__.py", "sitecustomize.py"):
        (llama / module).write_text(RUNS.format(ran=str(llama / "ran")))
    fields = json.loads((llama / "config.json").read_text())
    auto = {"AutoModelForCausalLM": "modeling_x.Model", "AutoConfig": "configuration_x.Config"}
    (llama / "config.json").write_text(json.dumps({**fields, "auto_map": auto}))
    before = everything(llama)
    assert plait.compile(llama, jit=False, mode="infer")(tokens()).isfinite().all()
    assert everything(llama) == before


def link(llama: Path, name: str) -> None:
    """A file of the folder, moved out, with a link in its place."""
    outside = llama.parent / "outside"
    outside.mkdir()
    (llama / name).rename(outside / name)
    (llama / name).symlink_to(outside / name)


def sharded(llama: Path, **changes: str) -> None:
    """An index in front, some of its tensors in another file."""
    places = dict.fromkeys(load_file(llama / SINGLE), SINGLE)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places | changes}))


@pytest.mark.parametrize("name", ["config.json", SINGLE, "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_is_refused(name: str, llama: Path) -> None:
    if "index" in name:
        sharded(llama)
    link(llama, name)
    refused(llama, "is a link out of the folder")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "a\0b"])
def test_an_index_leads_to_files_of_the_folder_alone(file: str, llama: Path) -> None:
    (llama.parent / "outside.safetensors").write_bytes((llama / SINGLE).read_bytes())
    sharded(llama, **{NORM: file})
    refused(llama, "no plain file name")


def test_a_link_in_a_circle_is_refused(llama: Path) -> None:
    (llama / SINGLE).unlink()
    (llama / SINGLE).symlink_to(llama / SINGLE)
    refused(llama, "a link that leads nowhere")


# -- saving -------------------------------------------------------------------------------


def unwritten(model: CompiledModel, target: Path, said: str, **options: Any) -> None:
    """Saving ends in an error of ours; nothing comes, goes or changes."""
    before = everything(target.parent)
    with pytest.raises(PlaitError, match=said):
        plait.save_hf(model, target, **options)
    assert everything(target.parent) == before
    assert not [p for p in target.parent.iterdir() if p.name.startswith(".")]


def test_a_tokenizer_that_leads_out_is_not_copied(llama: Path) -> None:
    model = plait.compile(llama, jit=False)
    (llama.parent / "secret").write_text("mine")
    (llama / "tokenizer.json").symlink_to(llama.parent / "secret")
    unwritten(model, llama.parent / "saved", "is a link out of the folder")


def test_names_of_other_places_are_not_written(llama: Path, tmp_path: Path) -> None:
    """What a config calls itself is no path: the files of a saved folder have names of ours."""
    model = plait.compile(llama, jit=False)
    model.origin = {**model.origin, "_name_or_path": "../../elsewhere", "architectures": ["../x"]}
    plait.save_hf(model, tmp_path / "saved")
    assert sorted(everything(tmp_path / "saved")) == ["config.json", SINGLE]
    model.origin = {**model.origin, "model_type": "../llama"}
    unwritten(model, tmp_path / "other", "model_type: is '../llama'")
    (tmp_path / "linked").symlink_to(tmp_path / "nowhere")
    unwritten(model, tmp_path / "linked", "is there already")


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond some bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(llama: Path, small_files: None) -> None:
    model = plait.compile(llama, jit=False)
    unwritten(model, llama.parent / "saved", "saved: cannot be written: .*too large")


# -- prompts ------------------------------------------------------------------------------

NONE = torch.empty(0, dtype=torch.int64)
PROMPTS: list[tuple[str, Callable[[CompiledModel], object], str]] = [
    ("no token", lambda m: m(tokens()[:, :0]), "there must be at least one row and one token"),
    ("no row", lambda m: m(tokens()[:0]), "there must be at least one row and one token"),
    ("no token to continue", lambda m: m.generate(tokens()[:, :0], 3), "token"),
    ("no row to continue", lambda m: m.generate(tokens()[:0], 3), "at least one row"),
    ("no rows in a list", lambda m: m.generate([], 3), "there are no prompts"),
    ("an empty row in a list", lambda m: m.generate([tokens()[0], NONE], 3), "empty"),
    ("a row that is all padding", lambda m: m.generate(tokens(), 3, mask=torch.tensor([[1] * 19, [0] * 19])), "empty"),
    ("all padding", lambda m: m(tokens(), mask=torch.zeros_like(tokens())), "mask leaves no token"),
    ("a token that is none", lambda m: m.generate(tokens() + 60, 3), "tokens are from 0 to 60"),
    ("a token below 0", lambda m: m(tokens() - 90), "tokens are from 0 to 60"),
    ("no whole numbers", lambda m: m.generate(tokens().double(), 3), "must be int64"),
    ("fewer than no tokens", lambda m: m.generate(tokens(), -1), "max_new_tokens is -1"),
    ("longer than the positions", lambda m: m(tokens().repeat(1, 4)), "would have 76 tokens; the model has a table of 64"),
    ("a prompt as long", lambda m: m.generate(tokens().repeat(1, 4), 1), "table of 64 positions"),
    ("growing longer", lambda m: m.generate(tokens(), 50), "table of 64 positions"),
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return plait.compile(folder(tmp_path_factory.mktemp("gpt2"), "gpt2"), jit=False, mode="infer")


@pytest.mark.parametrize(("use", "said"), [p[1:] for p in PROMPTS], ids=[p[0] for p in PROMPTS])
def test_a_prompt_that_cannot_be_is_refused(use: Callable[[CompiledModel], object], said: str, gpt2: CompiledModel) -> None:
    before = gpt2(tokens())
    with pytest.raises(DataError, match=said):
        use(gpt2)
    assert torch.equal(gpt2(tokens()), before)


def test_the_last_position_is_one(gpt2: CompiledModel) -> None:
    assert gpt2.generate(tokens(), 45).shape == (2, 64)
