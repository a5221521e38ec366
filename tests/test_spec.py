"""Model specs: what reads, what is refused and how, sizes, counts and small instances."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plait.frontends.count import parameter_count
from plait.frontends.kinds import MAX_SIZE, Attention, Gdn, Kda, Mamba2, Mlp, Moe, Rope, RopeScaling
from plait.frontends.load import dump_spec, load_spec
from plait.frontends.sequence import Kind
from plait.frontends.shrink import shrink
from plait.frontends.spec import ModelSpec, named_kinds
from plait.ir.errors import SpecError

ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 10}
GDN = {"key_heads": 2, "value_heads": 4, "key_dim": 6, "value_dim": 10}
MAMBA2 = {"heads": 6, "head_dim": 5, "state": 7, "groups": 3}
MOE = {"experts": 6, "top_k": 2, "width": 9}
BASE: dict[str, Any] = {"vocab": 61, "hidden": 25}


def refusal(**fields: Any) -> str:
    with pytest.raises(SpecError) as error:
        load_spec({**BASE, **fields})
    return str(error.value)


# --- strategies

sizes = st.integers(1, 130)
small = st.integers(1, 4)
reals = st.floats(1e-6, 1e6)
acts = st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2"])
flags = st.booleans()


@st.composite
def ropes(draw: st.DrawFn) -> Rope:
    scaling = RopeScaling(factor=draw(reals), low=1.0, high=draw(st.floats(1.5, 9)), original=draw(sizes))
    fraction = draw(st.sampled_from([0.25, 0.5, 1.0]))
    return Rope(theta=draw(reals), fraction=fraction, interleaved=draw(flags), scaling=draw(st.sampled_from([None, scaling])))


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    kv_heads = draw(small)
    return Attention(
        heads=kv_heads * draw(small), kv_heads=kv_heads, head_dim=8 * draw(small), rope=draw(st.none() | ropes()),
        qk_norm=draw(flags), window=draw(st.integers(0, 99)), gate=draw(flags), sinks=draw(flags), bias=draw(flags),
        out_bias=draw(flags), softcap=draw(st.just(0.0) | reals), scale=draw(st.none() | reals), causal=draw(flags),
    )  # fmt: skip


@st.composite
def mamba2s(draw: st.DrawFn) -> Mamba2:
    groups = draw(small)
    limit = draw(st.none() | st.tuples(st.floats(0, 1), st.floats(1, 9)))
    return Mamba2(
        heads=groups * draw(small), head_dim=draw(sizes), state=draw(sizes), groups=groups, conv=draw(small),
        norm_groups=draw(st.sampled_from([1, groups])), conv_bias=draw(flags), dt_limit=limit,
    )  # fmt: skip


@st.composite
def moes(draw: st.DrawFn) -> Moe:
    groups, shared = draw(small), draw(st.integers(0, 40))
    limit = draw(st.integers(1, groups))
    each = draw(st.integers(2, 9))
    return Moe(
        experts=groups * each, groups=groups, group_limit=limit, top_k=draw(st.integers(1, each * limit)), width=draw(sizes),
        act=draw(acts), glu=draw(flags), score=draw(st.sampled_from(["softmax", "sigmoid"])), renormalize=draw(flags),
        route_bias=draw(flags), route_scale=draw(reals), shared_width=shared, shared_gate=draw(flags) and shared > 0,
        aux_loss=draw(reals), z_loss=draw(reals),
    )  # fmt: skip


@st.composite
def gdns(draw: st.DrawFn) -> Gdn:
    key_heads = draw(small)
    return Gdn(key_heads=key_heads, value_heads=key_heads * draw(small), key_dim=draw(sizes), value_dim=draw(sizes))


kdas = st.builds(Kda, heads=small, head_dim=sizes, conv=small)
mlps = st.builds(Mlp, width=sizes, act=acts, glu=flags, bias=flags)
blocks = st.one_of(attentions(), gdns(), kdas, mamba2s(), mlps, moes())


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kinds = draw(st.lists(blocks, min_size=1, max_size=4))
    sequence = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=12))
    stages = draw(st.sampled_from([(), (1, len(sequence) - 1)])) if len(sequence) > 1 else ()
    return ModelSpec(
        name="a.b-c_1", vocab=draw(sizes), hidden=draw(sizes), blocks=tuple(sequence), stages=stages,
        norm=draw(st.sampled_from(["rms", "layer"])), norm_eps=draw(st.floats(1e-9, 1e-3)), zero_centered=draw(flags),
        tied=draw(flags), embed_scale=draw(reals), dropout=draw(st.floats(0, 0.9)), max_length=draw(sizes),
        dtype=draw(st.sampled_from(["bf16", "f16", "f32", "f64"])),
    )  # fmt: skip


# --- reading and writing


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_dump_reads_back_equal(spec: ModelSpec) -> None:
    again = load_spec(tomllib.loads(dump_spec(spec)))
    assert again == spec and hash(again) == hash(spec)
    assert dump_spec(again) == dump_spec(spec)


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_files_read_back_equal(tmp_path: Path, suffix: str) -> None:
    spec = load_spec("demo")
    text = dump_spec(spec)
    file = tmp_path / f"m.{suffix}"
    file.write_text(text if suffix == "toml" else json.dumps(tomllib.loads(text)))
    assert load_spec(file) == load_spec(str(file)) == spec


def test_the_three_ways_agree() -> None:
    tables = {"gdn": GDN, "attention": ATTENTION, "moe": MOE}
    pattern = ModelSpec.of(**BASE, **tables, pattern="GEGE*EGE")
    ratio = ModelSpec.of(**BASE, **tables, ratio={"mixers": ["gdn", "gdn", "attention"], "ffn": "moe", "depth": 4})
    names = ModelSpec.of(**BASE, **tables, blocks=["gdn", "moe", "gdn", "moe", "attention", "moe", "gdn", "moe"])
    inline = ModelSpec.of(**BASE, blocks=[Gdn(**GDN), {"kind": "moe", **MOE}] * 2 + ["a", "e", "g", "e"], kinds={
        "a": {"kind": "attention", **ATTENTION}, "e": Moe(**MOE), "g": {"kind": "gdn", **GDN},
    })  # fmt: skip
    assert pattern == ratio == names == inline


def test_named_kinds_make_per_layer_differences() -> None:
    local = {"kind": "attention", **ATTENTION, "window": 16}
    spec = ModelSpec.of(
        **BASE, attention=ATTENTION, kinds={"local": local}, ratio={"mixers": ["local", "local", "attention"], "depth": 5}
    )
    assert [b.window for b in spec.blocks if isinstance(b, Attention)] == [16, 16, 0, 16, 16]
    assert list(named_kinds(spec)) == ["attention", "attention_2"]


def test_defaults_follow_other_fields() -> None:
    assert Attention(heads=6, head_dim=4).kv_heads == 6
    assert Mamba2(heads=6, head_dim=4, state=3, groups=2).norm_groups == 2
    assert Mamba2(heads=6, head_dim=4, state=3).norm_groups == 1
    assert Moe(experts=8, top_k=2, width=3, groups=4).group_limit == 4
    assert Attention(heads=6, head_dim=4).multiplier == 0.5
    assert Attention(heads=6, head_dim=4, scale=3.0).multiplier == 3.0


# --- refusals


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attention": {**ATTENTION, "kv_heads": 3}}, "attention.kv_heads: is 3; must divide heads = 4"),
        ({"attention": {**ATTENTION, "kv_head": 1}}, "attention.kv_head: unknown field; did you mean 'kv_heads'? known: kind"),
        ({"attention": {**ATTENTION, "rope": {"fraction": 0.5}}}, "which rotates 5 of head_dim = 10 columns; must rotate"),
        ({"attention": {**ATTENTION, "rope": {"tehta": 1}}}, "attention.rope.tehta: unknown field; did you mean 'theta'?"),
        ({"attention": {**ATTENTION, "rope": {"theta": -1.0}}}, "attention.rope.theta: is -1.0; must be greater than 0 (base"),
        ({"attention": {**ATTENTION, "rope": {"scaling": {"factor": 2, "low": 4, "original": 9}}}}, "low: is 4.0; must be"),
        ({"attention": {"heads": 4}}, "attention.head_dim: missing (columns of a head)"),
        ({"attention": {**ATTENTION, "heads": True}}, "attention.heads: is True; must be a valid integer"),
        ({"attention": {**ATTENTION, "heads": "4"}}, "attention.heads: is '4'; must be a valid integer"),
        ({"attention": {**ATTENTION, "softcap": float("nan")}}, "attention.softcap: is nan; must be a finite number"),
        ({"attention": {**ATTENTION, "softcap": float("inf")}}, "attention.softcap: is inf; must be a finite number"),
        ({"attention": {**ATTENTION, "heads": 2**32}}, "attention.heads: is 4294967296; must be less than or equal to"),
        ({"attention": {"heads": 2**20, "head_dim": 2**20}}, "makes heads * head_dim * (2 if gate) = 1099511627776; must stay"),
        ({"attention": {**ATTENTION, "kind": "gdn"}}, "attention.kind: is 'gdn'; must be 'attention' here"),
        ({"attention": 3}, "attention: is 3; must be a table"),
        ({"gdn": {**GDN, "key_heads": 3}}, "gdn.key_heads: is 3; must divide value_heads = 4"),
        ({"gdn": {**GDN, "gate_act": "relu"}}, "gdn.gate_act: is 'relu'; must be 'silu' or 'sigmoid'"),
        ({"mamba2": {**MAMBA2, "groups": 4}}, "mamba2.groups: is 4; must divide heads = 6"),
        ({"mamba2": {**MAMBA2, "norm_groups": 4}}, "mamba2.norm_groups: is 4; must divide heads * head_dim = 30"),
        ({"mamba2": {**MAMBA2, "dt_min": 1.0}}, "mamba2.dt_min: is 1.0; must be at most dt_max = 0.1"),
        ({"mamba2": {**MAMBA2, "dt_limit": [0.0, float("inf")]}}, "mamba2.dt_limit.1: is inf; must be a finite number"),
        ({"moe": {**MOE, "top_k": 7}}, "moe.top_k: is 7; must be at most experts = 6"),
        ({"moe": {**MOE, "groups": 4}}, "moe.groups: is 4; must divide experts = 6"),
        ({"moe": {**MOE, "groups": 3, "group_limit": 1, "top_k": 3}}, "moe.top_k: is 3; must be at most experts in"),
        ({"moe": {**MOE, "groups": 6}}, "moe.groups: is 6; must leave at least 2 of 6 experts"),
        ({"moe": {**MOE, "shared_gate": True}}, "moe.shared_gate: is true; must be false without a shared expert"),
        ({"kinds": {"local": {"kind": "atention"}}}, "kinds.local.kind: is 'atention'; did you mean 'attention'? known: atte"),
        ({"kinds": {"local": {"heads": 2}}}, "kinds.local.kind: missing; known: attention, gdn, kda"),
        ({"kinds": {"mlp": {"kind": "mlp", "width": 3}}}, "kinds.mlp: is also the table [mlp]"),
        ({"kinds": []}, "kinds: is []; must be a table of named kinds"),
        ({"kinds": {"a b": {}}}, "kinds.'a b': is no name"),
        ({"blocks": []}, "blocks: is []; must be a list of 1 to 10000"),
        ({"blocks": "mlp"}, "blocks: is 'mlp'; must be a list"),
        ({"blocks": ["mlpp"]}, "blocks.0: 'mlpp' names no table; did you mean 'mlp'? known: mlp"),
        ({"blocks": [{"kind": "mlp"}]}, "blocks.0.width: missing (hidden columns)"),
        ({"blocks": [3]}, "blocks.0: is 3; must be a table"),
        ({"blocks": ["mlp"], "pattern": "-"}, "blocks: blocks and pattern given; must be exactly one of blocks, pattern and"),
        ({"blocks": ["mlp"], "stages": [2]}, "stages: sums to 2; must sum to the number of blocks = 1"),
        ({"blocks": ["mlp"], "norm_eps": 0.0}, "norm_eps: is 0.0; must be greater than 0"),
        ({"blocks": ["mlp"], "hiden": 1}, "hiden: unknown field; did you mean 'hidden'? known: name, vocab, hidden"),
        ({"blocks": ["mlp"], "dropout": 1.0}, "dropout: is 1.0; must be less than 1"),
        ({"blocks": ["mlp"], "name": "../x"}, "name: is '../x'; must match pattern"),
        ({"blocks": ["mlp"], 1: 2}, "1: is no field name; must be text"),
        ({"pattern": 7}, "pattern: is 7; must be letters"),
        ({"pattern": "-|-", "stages": [1, 1]}, "stages: is [1, 1]; must be absent beside '|'"),
        ({"ratio": {"mixers": ["mlp"], "depth": 10**9}}, "ratio.depth: is 1000000000; must be less than or equal to 5000"),
        ({"ratio": {"mixers": [], "depth": 1}}, "ratio.mixers: is empty; must name at least one kind"),
        ({"ratio": {"mixers": ["mlp"], "depth": 1, "ffn": "x"}}, "ratio: 'x' names no table; known: mlp"),
        ({"ratio": 3}, "ratio: is 3; must be a table"),
    ],
)  # fmt: skip
def test_each_mistake_is_named(fields: dict[Any, Any], says: str) -> None:
    way = {} if {"blocks", "pattern", "ratio"} & set(fields) else {"blocks": ["mlp"]}
    text = refusal_of({**BASE, "mlp": {"width": 3}, **way, **fields})
    assert says in text
    assert text.startswith("spec: ") and "pydantic" not in text, "one mistake is one problem"


def refusal_of(fields: dict[Any, Any]) -> str:
    with pytest.raises(SpecError) as error:
        load_spec(fields)
    return str(error.value)


def test_every_problem_is_listed_once() -> None:
    tables = {"gdn": {**GDN, "key_heads": 3, "conv": 0}, "attention": {**ATTENTION, "kv_heads": 3}}
    text = refusal(**tables, pattern="G-" * 9, dtype="bf8")
    assert text.startswith("spec has 4 problems:\n")
    paths = [line.split(":")[0].strip() for line in text.split("\n")[1:]]
    assert paths == ["attention.kv_heads", "gdn.conv", "pattern", "dtype"]


def test_constructors_complain_the_same_way() -> None:
    with pytest.raises(SpecError, match="Attention: kv_heads: is 3; must divide heads = 4"):
        Attention(heads=4, kv_heads=3, head_dim=2)
    broken: Any = {"kind": "attention", "heads": 0, "head_dim": 3, "rope": {"thet": 1}}
    with pytest.raises(SpecError, match=r"(?s)blocks\.0\.attention\.heads: is 0.*rope\.thet: unknown field; did you mean"):
        ModelSpec(vocab=3, hidden=3, blocks=(broken,))
    with pytest.raises(SpecError, match=r"blocks\.0\.kind: is 'atention'; did you mean 'attention'"):
        ModelSpec(vocab=3, hidden=3, blocks=({"kind": "atention"},))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("m.toml", b"", "is empty"),
        ("m.toml", b" \n\t", "is empty"),
        ("m.toml", b"vocab = \xff", "is not UTF-8 text (byte 8)"),
        ("m.toml", b"vocab = ", "m.toml: does not parse"),
        ("m.toml", b"vocab = 1\nvocab = 2", "m.toml: does not parse"),
        ("m.toml", b"#" * (2**20 + 1), "is larger than 1048576 bytes"),
        ("m.toml", b"a = " + b"[" * 200_000, "m.toml: does not parse"),
        ("m.toml", b".".join([b"a"] * 500_000) + b" = 1", "has more than 300 dots"),
        ("m.toml", b'"a b".' * 301 + b"a = 1", "has more than 300 dots"),
        ("m.toml", b"vocab = 0x" + b"f" * 900_000, "vocab: is too large to print (int); must be"),
        ("m.toml", b"\n".join(b"a%d = 1" % i for i in range(90_000)), "more"),
        ("m.toml", b"a" * 1_000_000, "m.toml: does not parse"),
        ("m.json", b"[" * 500_000, "m.json: does not parse"),
        ("m.json", b"[1]", "is [1]; must be an object"),
        ("m.json", b'{"vocab": NaN}', "NaN is no number here"),
        ("m.json", b'{"vocab": 1, "vocab": 2}', "'vocab' is given twice"),
        ("m.json", b'{"vocab": ' + b"1" * 9999 + b"}", "m.json: does not parse"),
        ("m.yaml", b"vocab: 1", "is neither a preset nor a .toml or .json file"),
    ],
)
def test_bad_files_are_refused_quickly(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(SpecError) as error:
        load_spec(file)
    assert says in str(error.value)
    assert len(str(error.value)) < 20_000
    assert time.perf_counter() - start < 5


def test_missing_files_and_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(SpecError, match="is a directory"):
        load_spec(tmp_path / "d.toml")
    with pytest.raises(SpecError, match="does not exist"):
        load_spec(tmp_path / "absent.toml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec("a\0.toml")
    with pytest.raises(SpecError, match=r"neither a preset nor .* did you mean 'qwen3-next-80b-a3b'\?"):
        load_spec("qwen3-next-80b")
    with pytest.raises(SpecError, match="must be a path, a preset's name or a mapping"):
        load_spec(3)  # pyright: ignore[reportArgumentType]


junk = st.recursive(
    st.none() | flags | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_spec_is_refused_or_still_a_spec(data: st.DataObject) -> None:
    """Whatever replaces a field, the answer is a spec or a SpecError, never another error."""
    fields: dict[Any, Any] = {**BASE, "gdn": dict(GDN), "attention": {**ATTENTION, "rope": {"theta": 9.0}}, "moe": dict(MOE)}
    fields |= {"kinds": {"local": {"kind": "mlp", "width": 3}}, "mamba2": dict(MAMBA2)}
    fields |= {"ratio": {"mixers": ["gdn", "mamba2", "attention"], "ffn": "moe", "depth": 3}}
    place = fields
    while True:
        key = data.draw(st.sampled_from([*place, "new"]))
        inner = place.get(key)
        if isinstance(inner, dict) and data.draw(flags):
            place = inner
            continue
        place[key] = data.draw(junk)
        break
    try:
        spec = load_spec(fields)
    except SpecError as error:
        assert len(str(error)) < 20_000
        return
    assert load_spec(tomllib.loads(dump_spec(spec))) == spec


# --- small instances


def flat(record: Any) -> dict[str, Any]:
    """Fields by path, nested records spread out."""
    found: dict[str, Any] = {}
    for name, value in record.model_dump().items():
        nested = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        found |= nested
    return found


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_shrink_keeps_the_structure(spec: ModelSpec) -> None:
    small_spec = shrink(spec)
    assert parameter_count(small_spec) <= parameter_count(spec)
    assert (small_spec.vocab, small_spec.hidden) == (min(spec.vocab, 61), min(spec.hidden, 28))
    assert choices_of_blocks(small_spec) == choices_of_blocks(spec)
    assert len(small_spec.blocks) <= 2 * len(set(spec.blocks))
    assert (small_spec.norm_eps, small_spec.zero_centered, small_spec.tied) == (spec.norm_eps, spec.zero_centered, spec.tied)


def choices_of_blocks(spec: ModelSpec) -> list[dict[str, Any]]:
    """Flags, names and absences of the kinds, in order of first appearance, equal ones once."""
    keep = (bool, str, type(None))
    found = [{k: v for k, v in flat(b).items() if isinstance(v, keep)} for b in spec.blocks]
    return [f for i, f in enumerate(found) if f not in found[:i]]


@settings(max_examples=100, deadline=None)
@given(blocks)
def test_shrink_keeps_the_ratios(block: Kind) -> None:
    (small_block,) = {*shrink(ModelSpec(vocab=3, hidden=100, blocks=(block,))).blocks}
    match block, small_block:
        case Attention(), Attention():
            assert small_block.heads // small_block.kv_heads == min(2, block.heads // block.kv_heads)
            assert small_block.kv_heads == min(2, block.kv_heads)
            if block.rope and small_block.rope:
                assert small_block.rotated / small_block.head_dim == block.rotated / block.head_dim
            assert (small_block.window > 0) == (block.window > 0)
        case Gdn(), Gdn():
            assert small_block.value_heads // small_block.key_heads == min(2, block.value_heads // block.key_heads)
            assert small_block.key_heads == min(2, block.key_heads)
        case Mamba2(), Mamba2():
            assert small_block.groups == min(2, block.groups)
            assert small_block.heads // small_block.groups == min(2, block.heads // block.groups)
        case Moe(), Moe():
            assert small_block.experts <= 4 and small_block.groups == min(2, block.groups)
            assert small_block.top_k < small_block.experts or block.top_k == block.experts or block.groups > 1
            assert (small_block.shared_width > 0) == (block.shared_width > 0)
        case _:
            assert type(small_block) is type(block)


def test_sizes_stay_within_what_a_tensor_can_have() -> None:
    assert Mlp(width=MAX_SIZE, glu=False).width == MAX_SIZE
    with pytest.raises(SpecError, match=r"width: makes 2 \* width"):
        Mlp(width=MAX_SIZE)
