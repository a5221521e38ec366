"""Models with an encoder: what transformers computes, padding, generation with the encoder run once, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.api import Wish, _prepared  # pyright: ignore[reportPrivateUsage] # a mesh takes processes
from plait.frontends import ModelSpec, build, dump_spec, load_spec, parameter_count, shrink
from plait.frontends.hf import hf_tensors, load_hf, read_plan
from plait.ir import DataError, Graph, PlaitError, dump, evaluate, parameters, parse
from plait.ir.ops.biased import buckets, distance_bias
from plait.passes import DEFAULT, Pipeline, validate
from plait.runtime import CompiledModel, EncoderDecoder, Variant
from plait.runtime.encoded import shifted_right
from safetensors.torch import load_file, save_file

from tests.hf_adapter import Steps
from tests.hf_cases import config, product, tokens, weight, write
from tests.hf_cases_third import CASES, source
from tests.test_hf_families import GOLDEN, apart, folder, labels

Tensor = torch.Tensor
LENGTHS = torch.tensor([13, 13])


def spec_of_case(name: str) -> ModelSpec:
    return read_plan(config(name)).spec


def compiled(path: Path, name: str, dtype: str = "", mode: str = "infer") -> EncoderDecoder:
    model = plait.compile(folder(path, name), jit=False, mode=mode, dtype=dtype)
    assert isinstance(model, EncoderDecoder)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_folder_means_what_transformers_computes(name: str, tmp_path: Path) -> None:
    spec, weights = load_hf(folder(tmp_path, name))
    params = {k: v.double().requires_grad_() for k, v in weights.items()}
    golden = GOLDEN[name]
    with torch.no_grad():
        logits = evaluate(build(spec, dtype="f64"), tokens(), source(), LENGTHS, params=params)
    assert apart(logits[:, ::6, ::13].flatten(), torch.tensor(golden["logits"], dtype=torch.float64)) < 1e-12
    loss = evaluate(build(spec, task="loss", dtype="f64"), tokens(), labels(), source(), LENGTHS, params=params)
    assert float(loss.detach()) == pytest.approx(golden["loss"], rel=1e-12)
    loss.backward()
    flowed = {k: p.grad for k, p in params.items() if p.grad is not None}
    found = dict(hf_tensors(config(name), flowed, golden["gradients"]))
    most = max(map(abs, golden["gradients"].values()))
    for gradient, wanted in golden["gradients"].items():
        assert abs(float(product(found[gradient])) - wanted) < 1e-10 * most, gradient


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_folder_decodes_what_it_computes_and_is_written_back(name: str, tmp_path: Path) -> None:
    model = compiled(tmp_path, name)
    logits = model(source(), decoder_input_ids=tokens())
    assert apart(logits[:, ::6, ::13].flatten(), torch.tensor(GOLDEN[name]["logits"], dtype=torch.float64)) < 2e-5
    steps = Steps(model, 2, 19, model.encode(source()))
    cached = torch.cat([steps(tokens()[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 19))], 1)
    assert apart(cached, logits) < 1e-5
    plait.save_hf(model, tmp_path / "back")
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / name, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config(name)


@pytest.mark.parametrize("name", CASES)
def test_padding_of_the_encoder_changes_no_number(name: str, tmp_path: Path) -> None:
    model, counts = compiled(tmp_path, name, dtype="f64"), (13, 6)
    read = [row[:n] for row, n in zip(source(), counts, strict=True)]
    wanted = torch.cat([model(r[None], decoder_input_ids=t[None]) for r, t in zip(read, tokens(), strict=True)])
    for left in (False, True):
        mask = torch.ones_like(source())
        padded = source().clone()
        padded[1] = 7
        where = slice(7, 13) if left else slice(0, 6)
        padded[1, where], mask[1] = read[1], 0
        mask[1, where] = 1
        assert apart(model(padded, decoder_input_ids=tokens(), mask=mask), wanted) < 1e-13
        one, both = model.generate(read[1][None], 6), model.generate(padded, 6, mask=mask)
        assert torch.equal(both[1:], one)
    assert [r.tolist() for r in model.generate(read, 6)] == both.tolist()


def greedy(model: EncoderDecoder, count: int) -> Tensor:
    """Token by token without any cache."""
    said = torch.full((2, 1), model.start)
    for _ in range(count):
        said = torch.cat([said, model(source(), decoder_input_ids=said)[:, -1:].argmax(-1)], 1)
    return said


@pytest.mark.parametrize("name", ["t5_gated", "bart"])
def test_generation_reads_the_encoder_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = compiled(tmp_path, name, dtype="f64"), list[str]()
    wanted = greedy(model, 7)
    run = CompiledModel._run  # pyright: ignore[reportPrivateUsage] # what runs is counted

    def counted(self: CompiledModel, variant: Variant, *inputs: Tensor) -> tuple[Tensor, ...]:
        ran.append(variant.task)
        return run(self, variant, *inputs)

    monkeypatch.setattr(CompiledModel, "_run", counted)
    assert torch.equal(model.generate(source(), 7), wanted)
    assert ran == ["memory"]
    assert torch.equal(torch.stack([*model.stream(source(), 7)], 1), wanted[:, 1:])
    assert torch.equal(model.generate(source(), 4, decoder_input_ids=wanted[:, :4]), wanted)
    stopped = model.generate([*source()], 7, stop=int(wanted[0, 4]))
    assert stopped[0].tolist() == wanted[0, : wanted[0].tolist().index(int(wanted[0, 4]), 1) + 1].tolist()
    drawn = [model.generate(source(), 4, temperature=0.8, top_k=9, seed=s) for s in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_labels_are_read_one_place_later(tmp_path: Path) -> None:
    model = compiled(tmp_path, "t5", mode="train")
    wanted = tokens().clone()
    wanted[1, 9:] = -100
    read = shifted_right(wanted, model.start, model.pad)
    assert read[0].tolist() == [3, *tokens()[0, :-1].tolist()] and read[1, 10:].eq(0).all()
    loss = model.loss(source(), wanted)
    assert torch.equal(loss, model(source(), labels=wanted, decoder_input_ids=read))
    logits = model(source(), decoder_input_ids=read)
    assert float(loss.detach()) == pytest.approx(float(torch.nn.functional.cross_entropy(logits.mT, wanted).detach()), rel=1e-5)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p -= 0.1 * p.grad
    assert float(model.loss(source(), wanted).detach()) < float(loss.detach())


@pytest.mark.parametrize("name", CASES)
def test_its_spec_is_a_spec_like_any_other(name: str) -> None:
    for spec in (spec_of_case(name), shrink(spec_of_case(name))):
        shapes = [t for t, _ in parameters(build(spec)).values()]
        assert parameter_count(spec) == sum(t.count({}) for t in shapes)
        assert shrink(shrink(spec)) == shrink(spec)


@pytest.mark.parametrize("name", ["t5_gated", "bart"])
@pytest.mark.parametrize("text", [DEFAULT, "differentiate,recompute"])
def test_programs_stay_what_they_are(name: str, text: str) -> None:
    spec = shrink(spec_of_case(name))
    graphs: list[Graph] = [build(spec, task=task, dtype="f64") for task in ("logits", "loss", "memory", "reply")]
    assert all(parse(dump(g)) == g for g in graphs)
    made = Pipeline.parse(text).run(graphs[1], verify="types")
    report = validate(graphs[1], made, "reassociates", gradients="differentiate" in text)
    assert report.ok and max(r.error for r in report.rows) < 1e-12, report
    cached = Pipeline.parse("with-cache").run(graphs[3], verify="types")
    assert validate(graphs[3], cached, "exact").ok


@pytest.mark.parametrize("name", ["t5_gated", "bart"])
@pytest.mark.parametrize("text", ["place{mesh='cp=2 tp=2'},differentiate", "place{mesh='dp=2'}"])
def test_programs_may_be_placed(name: str, text: str) -> None:
    """Though batches on a mesh are of one sequence a row, so that processes do not run them."""
    graph = build(shrink(spec_of_case(name)), task="loss", dtype="f64")
    report = validate(graph, Pipeline.parse(text).run(graph, verify="types"), "reassociates", gradients="differentiate" in text)
    assert report.ok and max(r.error for r in report.rows) < 1e-12, report
    with pytest.raises(PlaitError, match=r"mesh is 'dp=2', but .* has an encoder"):
        _prepared(spec_of_case(name), Wish("cpu", "", "train", DEFAULT, "dp=2", ""))


def test_a_spec_says_an_encoder_with_the_same_tables(tmp_path: Path) -> None:
    relative = {"buckets": 8, "reach": 20}
    fields = {
        "vocab": 61, "hidden": 24, "attention": {"heads": 4, "head_dim": 6, "relative": relative}, "mlp": {"width": 20},
        "cross": {"heads": 4, "kv_heads": 2, "head_dim": 5, "bias": True}, "blocks": ["attention", "cross", "mlp"],
        "kinds": {"seen": {"kind": "attention", "heads": 2, "head_dim": 4, "causal": False, "rope": {}}},
        "encoder": {"ratio": {"mixers": ["seen"], "ffn": "mlp", "depth": 2}, "start": 5},
    }  # fmt: skip
    spec = load_spec(fields)
    (tmp_path / "spec.toml").write_text(dump_spec(spec))
    assert load_spec(tmp_path / "spec.toml") == spec
    model = plait.compile(spec, dtype="f64", jit=False, mode="infer")
    assert torch.equal(model.generate(source(), 5), greedy(model, 5))  # type: ignore[arg-type] # it has an encoder
    drops = plait.compile(load_spec({**fields, "dropout": 0.4}), dtype="f64", jit=False)
    once, again, other = (float(drops(source(), seed=torch.tensor(s), labels=tokens()).detach()) for s in (1, 1, 2))
    assert once == again != other
    for changes, said in (
        ({"encoder": {"blocks": ["attention"]}}, "encoder.blocks.0: must have causal = false"),
        ({"encoder": {"blocks": ["cross"]}}, "is of kind cross; must be attention or mlp"),
        ({"encoder": {"blocks": ["seen", "other"]}}, "encoder.blocks.1: 'other' names no table"),
        ({"blocks": ["attention", "mlp"]}, "encoder: is read by no block"),
        ({"encoder": None}, "blocks.1: is cross attention"),
        ({"attention": {"heads": 4, "head_dim": 6, "relative": {"buckets": 7}}}, "buckets: is 7; must be an even number"),
        ({"attention": {"heads": 4, "head_dim": 6, "relative": relative, "window": 3}}, "relative: must be absent beside"),
        ({"position_start": 2}, "position_start: is 2; must be 0"),
    ):  # fmt: skip
        with pytest.raises(PlaitError, match=said):
            load_spec({**fields, **changes})


def test_a_decoder_alone_may_have_a_relative_bias() -> None:
    spec = load_spec({
        "vocab": 61, "hidden": 24, "mlp": {"width": 20}, "blocks": ["attention", "mlp"] * 2,
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "relative": {"buckets": 8, "reach": 20}},
    })  # fmt: skip
    model = plait.compile(spec, dtype="f64", jit=False, mode="infer")
    made = model.generate(tokens(), 5)
    assert torch.equal(made[:, 19:], model(made[:, :-1])[:, 18:].argmax(-1))
    with pytest.raises(PlaitError, match="has a relative bias; segments cannot be packed"):
        model(tokens()[:1], torch.tensor([0, 7, 19]))


def test_distances_fall_into_the_buckets_they_are_said_to() -> None:
    """Exact up to half, then logarithmic, both sides apart unless causal; slopes are ALiBi."""
    found = buckets(torch.arange(-9, 10), 8, False, 11).tolist()
    assert found == [3, 3, 3, 3, 3, 2, 2, 2, 1, 0, 5, 6, 6, 6, 7, 7, 7, 7, 7]
    assert buckets(-torch.arange(12), 8, True, 11).tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 6, 7, 7, 7]
    slopes = torch.tensor([[0.5, 0.25]])
    bias = distance_bias(slopes, 2, 4, torch.tensor(1), True, 128, True)
    assert bias[1].tolist() == [[-0.25, 0.0, 0.25, 0.5], [-0.5, -0.25, 0.0, 0.25]]


SMALL = {
    "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.0, "eos_token_id": 1,
    "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512,
    "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"num_beams": 4}}, "vocab_size": 32128,
}  # fmt: skip
FLAN = {
    **SMALL, "d_ff": 1024, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu", "is_gated_act": True,
    "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "relative_attention_max_distance": 128,
    "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
BASE = {
    "_name_or_path": "bart-base", "activation_dropout": 0.0, "activation_function": "gelu", "add_bias_logits": False,
    "add_final_layer_norm": False, "attention_dropout": 0.0, "bos_token_id": 0, "classif_dropout": 0.1, "d_model": 768,
    "decoder_attention_heads": 12, "decoder_ffn_dim": 3072, "decoder_layerdrop": 0.0, "decoder_layers": 6, "dropout": 0.0,
    "decoder_start_token_id": 2, "early_stopping": True, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072,
    "encoder_layerdrop": 0.0, "encoder_layers": 6, "eos_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": 2,
    "gradient_checkpointing": False, "init_std": 0.02, "is_encoder_decoder": True, "max_position_embeddings": 1024,
    "model_type": "bart", "no_repeat_ngram_size": 3, "normalize_before": False, "normalize_embedding": True, "num_beams": 4,
    "num_hidden_layers": 6, "pad_token_id": 1, "scale_embedding": False, "torch_dtype": "float32", "vocab_size": 50265,
}  # fmt: skip


@pytest.mark.parametrize(("fields", "count"), [(SMALL, 60_506_624), (FLAN, 76_961_152), (BASE, 139_420_416 + 50_265)])
def test_published_configs_are_read(fields: dict[str, Any], count: int) -> None:
    """As many parameters as these models are known to have; the bias of logits is no parameter there."""
    spec = read_plan(fields).spec
    assert parameter_count(spec) == count and spec.encoder
    assert (spec.encoder.start, spec.encoder.pad) == (fields["decoder_start_token_id"], fields["pad_token_id"])
    assert spec.tied == (fields is not FLAN)


def test_a_saved_file_is_a_model_with_an_encoder_again(tmp_path: Path) -> None:
    model = compiled(tmp_path, "t5_gated")
    model.save(tmp_path / "weights.safetensors")
    again = plait.load(tmp_path / "weights.safetensors", jit=False, mode="infer")
    assert isinstance(again, EncoderDecoder) and again.start == model.start == 3
    assert torch.equal(again.generate(source(), 3), model.generate(source(), 3))


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("t5", {"feed_forward_proj": "gated-foo"}, "feed_forward_proj: is 'foo'"),
    ("t5", {"dense_act_fn": "gelu"}, "dense_act_fn: is 'gelu'; 'relu'"),
    ("t5", {"is_decoder": True}, "is_decoder: is True; False"),
    ("t5", {"relative_attention_num_buckets": 7}, "buckets: is 7"),
    ("t5", {"num_experts": 8}, "num_experts: is 8, which is not honoured for t5"),
    ("t5", {"pad_token_id": 99}, "pad token: is 99"),
    ("bart", {"normalize_before": True}, "normalize_before: is True; False"),
    ("bart", {"decoder_attention_heads": 5}, "decoder_attention_heads: is 5; must divide d_model = 24"),
    ("bart", {"activation_function": "mish"}, "activation_function: is 'mish'"),
]


@pytest.mark.parametrize(("name", "changes", "said"), MISTAKES)
def test_what_is_not_honoured_is_named(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlaitError, match=said):
        read_plan({**config(name), **changes})


def test_copies_of_the_embedding_and_absent_zeros_are_known(tmp_path: Path) -> None:
    shapes = GOLDEN["bart"]["shapes"]
    whole = {n: weight(n, tuple(s)) for n, s in shapes.items()}
    more = {**whole, **{f"model.{s}.embed_tokens.weight": whole["model.shared.weight"].clone() for s in ("encoder", "decoder")}}
    fewer = {n: t for n, t in more.items() if n != "final_logits_bias"}
    spec, weights = load_hf(write(tmp_path / "more", config("bart"), fewer))
    assert not weights["final.head_bias"].any() and len(weights) == len({*parameters(build(spec))})
    bare = {n.removeprefix("model."): t for n, t in fewer.items()}
    _, same = load_hf(write(tmp_path / "bare", config("bart"), bare))
    assert all(torch.equal(same[n], weights[n]) for n in weights)
    more["model.encoder.embed_tokens.weight"][0, 0] += 1
    save_file(more, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlaitError, match=r"twice, but model.encoder.embed_tokens.weight differs from model.shared.weight"):
        load_hf(tmp_path / "more")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    model = compiled(tmp_path, "bart")
    long, none = tokens().repeat(1, 2), torch.tensor([[1] * 13, [0] * 13])
    for call, said in (
        (lambda: model(source()), "decoder_input_ids is missing"),
        (lambda: model.loss(source()), "labels is missing"),
        (lambda: model(source(), torch.tensor([0, 13]), decoder_input_ids=tokens()), "cu packs segments"),
        (lambda: model(source()[:1], decoder_input_ids=tokens()), "they go in pairs"),
        (lambda: model.loss(source(), tokens(), decoder_input_ids=tokens()[:, :3]), "labels is .* it must be as"),
        (lambda: model(source(), decoder_input_ids=tokens(), mask=none), "row 1 of the encoder's"),
        (lambda: model(long, decoder_input_ids=tokens()), "a row of the encoder's tokens would have 38 tokens"),
        (lambda: model.generate(source(), 40), "prompt 0 with 40 new tokens would have 40 tokens"),
        (lambda: model.generate([source()[0], source()[0][:0]], 4), "row 1 of the encoder's tokens is empty"),
        (lambda: model.whole_logits(source()), "a text alone is for models without an encoder"),
        (lambda: model.cache(2), "a cache is for models without an encoder"),
        (lambda: model(source() + 40, decoder_input_ids=tokens()), "holds the token"),
    ):
        with pytest.raises(DataError, match=said):
            call()
    full = build(spec_of_case("t5"), dtype="f64")
    with pytest.raises(PlaitError, match=r"with-cache: biased_attention at .*: it is not causal"):
        Pipeline.parse("with-cache").run(full)
    with pytest.raises(PlaitError, match="the program 'memory' is of models with an encoder"):
        build(read_plan(config("llama")).spec, task="memory")
