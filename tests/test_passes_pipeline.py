"""Pipelines as text, options typed by the signature, watching, verifying, requiring, and reproducers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plait.ir import Graph, ParseError, PassError, Replay, parse, tensor_type
from plait.passes import NUMERICS, PASSES, Event, PassFailed, Pipeline, Remark, read_reproducer, register
from plait.passes.pipeline import read_value

GATED = parse("""
def mixer(o: f32[b, s, 3, 5], z: f32[b, s, 15], w: f32[5]):
    n = rms_norm(o, w)  # f32[b, s, 3, 5] from layers.3.out_norm
    h = reshape(z, pattern='... (h=3 d) -> ... h d')
    g = silu(h)
    y = mul(n, g)
    return y
""")


@pytest.fixture
def scratch():
    """Passes registered inside a test leave with it."""
    known = dict(PASSES)
    yield
    PASSES.clear()
    PASSES.update(known)


def test_every_pass_says_what_it_is_for_and_how_it_changes_numbers():
    for name, made in PASSES.items():
        assert made.about and made.numerics in NUMERICS, name


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("dce", "dce"),
        (" fuse , dce ", "fuse,dce"),
        ("fuse{only=norm-gate+glu}", "fuse{only=norm-gate+glu}"),
        ("fuse{ without=glu  only=skip }", "fuse{only=skip without=glu}"),
        ("outline-rows{max_ops=7 min_ops=2}", "outline-rows{max_ops=7}"),
        ("with-cache{last=true},dce", "with-cache{last=true},dce"),
        ("with-cache{last=false}", "with-cache"),
    ],
)
def test_pipeline_text_has_one_canonical_form(text: str, canonical: str):
    assert str(Pipeline.parse(text)) == canonical
    assert Pipeline.parse(canonical) == Pipeline.parse(text)


@pytest.mark.parametrize(
    ("text", "kind", "says", "column"),
    [
        ("dce,fus", PassError, "no pass called fus; did you mean fuse?", 4),
        ("zzzz", PassError, "there are balance, canonicalize", 0),
        ("fuse{onli=glu}", PassError, "fuse has no option onli; did you mean only?", 5),
        ("fuse{only=norm-gat}", PassError, "cannot be 'norm-gat'; did you mean norm-gate?", 10),
        ("outline-rows{max_ops=many}", PassError, "max_ops is 'many', must be int", 21),
        ("with-cache{last=1}", PassError, "must be true or false", 16),
        ("fuse{only=glu only=skip}", PassError, "given twice", 14),
        ("fuse{only=glu", ParseError, "closing brace", 13),
        ("fuse{only}", ParseError, "expected `option=value`", 5),
        ("fuse{only=glu,without=skip}", ParseError, "parted by spaces", 13),
        ("fuse dce", ParseError, "expected `,` between passes", 5),
        ("fuse,", ParseError, "expected the name of a pass", 5),
        ("fuse,,dce", ParseError, "expected the name of a pass", 5),
        ("{}", ParseError, "expected the name of a pass", 0),
    ],
)
def test_a_mistake_in_pipeline_text_is_pointed_at(text: str, kind: type[Exception], says: str, column: int):
    with pytest.raises(kind) as caught:
        Pipeline.parse(text)
    assert says in str(caught.value)
    assert str(caught.value).splitlines()[-1].index("^") == column + 2


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "-3", -3),
        ("float", "1e-3", 1e-3),
        ("bool", "false", False),
        ("str", "a b", "a b"),
        ("tuple[str, ...]", "a+b", ("a", "b")),
    ],
)
def test_option_values_have_the_type_that_the_signature_says(kind: str, text: str, value: object):
    assert read_value(kind, text) == value


def test_events_carry_what_ran():
    events = list[Event]()
    after = Pipeline.parse("fuse{only=norm-gate+skip},dce").run(GATED, watch=events.append, verify="types")
    assert [(e.index, e.name, e.stage) for e in events] == [(0, "fuse", "fuse{only=norm-gate+skip}"), (1, "dce", "dce")]
    assert events[0].before is GATED and events[1].after is after and events[0].after is events[1].before
    assert all(e.seconds >= 0 for e in events)
    fired, absent = events[0].remarks
    assert (fired.kind, fired.what, fired.by) == ("passed", "norm-gate", "fuse")
    assert absent == Remark("note", "skip", "mixer", "no match", "fuse")
    assert "4 ops" in fired.why and str(absent) == "fuse: note skip at mixer: no match"


def test_a_pass_that_changes_nothing_says_so():
    events = list[Event]()
    Pipeline.parse("dce").run(GATED, watch=events.append)
    assert events[0].remarks == (Remark("note", "dce", "mixer", "nothing changed", "dce"),)


def test_a_required_fusion_must_fire():
    Pipeline.parse("fuse").run(GATED, require=("norm-gate",))
    Pipeline.parse("fuse{require=norm-gate}").run(GATED)
    with pytest.raises(PassError, match="qkv-prep is required and did not fire; mixer: no match"):
        Pipeline.parse("fuse").run(GATED, require=("qkv-prep",))
    with pytest.raises(PassError, match="glu is required and did not fire"):
        Pipeline.parse("fuse{require=norm-gate+glu}").run(GATED)
    with pytest.raises(PassError, match="no pass looked for it"):
        Pipeline.parse("dce").run(GATED, require=("glu",))


def test_the_reason_of_a_miss_is_in_the_refusal():
    kept = parse("""
def mixer(o: f32[b, s, 5], z: f32[b, s, 5]):
    n = rms_norm(o)
    g = silu(z)
    y = mul(n, g)
    return y, n
""")
    with pytest.raises(PassError, match=r"norm-gate is required.*the result of rms_norm is used elsewhere"):
        Pipeline.parse("fuse").run(kept, require=("norm-gate",))


def test_what_a_pass_raises_names_it_and_carries_a_reproducer(scratch: None):
    @register(numerics="exact")
    def break_down(graph: Graph, *, times: int = 1) -> Graph:
        """Fail."""
        return graph if times == 0 else [graph][times]

    with pytest.raises(PassFailed) as caught:
        Pipeline.parse("dce,break-down{times=3}").run(GATED, verify="types")
    error = caught.value
    assert error.name == "break-down" and error.internal and "pass break-down: IndexError" in str(error)
    assert isinstance(error.__cause__, IndexError)
    pipeline, graph = read_reproducer(error.reproducer)
    assert str(pipeline) == "break-down{times=3}" and graph == GATED
    with pytest.raises(PassFailed, match="break-down"):
        pipeline.run(graph)


def test_a_refusal_is_no_internal_error():
    with pytest.raises(PassFailed) as caught:
        Pipeline.parse("fuse{require=glu}").run(GATED)
    assert not caught.value.internal


def test_text_that_is_no_reproducer_is_refused():
    with pytest.raises(ParseError, match="a reproducer starts with"):
        read_reproducer("def f(x: f32[3]):\n    return x\n")


def test_values_are_made_above_their_uses(scratch: None):
    @register(numerics="exact")
    def lie(graph: Graph) -> Graph:
        """Keep the nodes and forget one."""
        return Graph(graph.name, graph.inputs, graph.params, graph.inits, graph.nodes[1:], graph.outputs)

    with pytest.raises(PassError, match="pass lie: mixer: mul reads n, which is not made above it"):
        Pipeline.parse("lie").run(GATED)


def test_types_are_inferred_again(scratch: None):
    @register(numerics="exact")
    def mislabel(graph: Graph) -> Graph:
        """Call the result f64."""
        wrong = replace(graph.outputs[0], type=tensor_type("f64", "b", "s", 3, 5))
        nodes = (*graph.nodes[:-1], replace(graph.nodes[-1], outputs=(wrong,)))
        return Graph(graph.name, graph.inputs, graph.params, graph.inits, nodes, (wrong,))

    Pipeline.parse("mislabel").run(GATED)
    with pytest.raises(PassError, match=r"pass mislabel: mixer: mul gives f32\[b, s, 3, 5\], the graph says f64"):
        Pipeline.parse("mislabel").run(GATED, verify="types")


def test_numeric_verification_names_the_pass_and_the_worst_tensor(scratch: None):
    @register(numerics="exact")
    def swap_gate(graph: Graph) -> Graph:
        """Sigmoid for silu."""
        replay = Replay(graph)
        return replay.run(lambda n, x: [replay.builder.emit(parse_op("sigmoid"), x)[0]] if n.is_op("silu") else None)

    def parse_op(name: str):
        from plait.ir import OPS

        return OPS[name]

    Pipeline.parse("fuse,dce").run(GATED, verify="numeric")
    with pytest.raises(PassFailed, match=r"pass swap-gate: changed what mixer computes: (result|gradient)"):
        Pipeline.parse("swap-gate").run(GATED, verify="numeric")


def test_verify_is_one_of_three():
    with pytest.raises(PassError, match="verify is 'on', must be one of off, types, numeric"):
        Pipeline.parse("dce").run(GATED, verify="on")


def test_a_pass_runs_once_on_each_distinct_layer(scratch: None):
    seen = list[str]()

    @register(numerics="exact")
    def visit(graph: Graph) -> Graph:
        """Note every graph."""
        seen.append(graph.name)
        return graph

    model = parse("""
def model(x: f32[b, 3]):
    a = one(x, params='layers.0')
    c = two(a, params='layers.1')
    y = one(c, params='layers.2')
    return y

@layer
def one(x: f32[b, 3], *, w: f32[3] = normal(0.02)):
    y = add_bias(x, w)
    return y

@layer
def two(x: f32[b, 3]):
    y = silu(x)
    return y
""")
    Pipeline.parse("visit").run(model, verify="numeric")
    assert seen == ["one", "two", "model"]


def test_registering_needs_words_a_class_and_typed_options(scratch: None):
    def silent(graph: Graph) -> Graph:
        return graph

    with pytest.raises(ValueError, match="docstring"):
        register(numerics="exact")(silent)
    with pytest.raises(ValueError, match="numerics is 'roughly'"):
        register(numerics="roughly")

    def listed(graph: Graph, *, names: list[str]) -> Graph:
        """Take a list."""
        return graph

    with pytest.raises(ValueError, match="option names needs a default and one of the types"):
        register(numerics="exact")(listed)
