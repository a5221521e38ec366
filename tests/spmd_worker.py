"""One rank of the programs in test_spmd: runs them all and leaves numbers and errors in files."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from plait.ir import DTYPES, Graph, PlaitError, TensorType, parameters, parse
from plait.ir.gradient import cotangent_type
from plait.ir.sizes import value
from plait.lowering.forms.collectives import COLLECTIVE_FORMS as FORMS
from plait.lowering.forms.under_way import UNDER_WAY_FORMS
from plait.passes import differentiate
from plait.runtime.mesh import Place, close, handshake, init, launched
from plait.runtime.spmd import gathered, gradients, run
from safetensors.torch import save_file

Tensor = torch.Tensor
WAIT = 40.0

ATTEND = """def model(tokens: i64[b, s@cp], labels: i64[b, s], *, table: f64[11, 8] = normal(1.0),
                w_in: f64[24, 8] = normal(0.4), w_out: f64[8, 8] = normal(0.4)):
    x = embedding(table, tokens)
    p = linear(x, w_in)
    q0, k0, v0 = split(p, sizes=(8, 8, 8))
    q1 = reshape(q0, pattern='b s (h d=4) -> b s h d')
    k1 = reshape(k0, pattern='b s (h d=4) -> b s h d')
    v1 = reshape(v0, pattern='b s (h d=4) -> b s h d')
    q = all_to_all(q1, axis='cp', src=1, dst=2)
    k = all_to_all(k1, axis='cp', src=1, dst=2)
    v = all_to_all(v1, axis='cp', src=1, dst=2)
    a = attention(q, k, v)
    o = all_to_all(a, axis='cp', src=2, dst=1)
    j = reshape(o, pattern='b s h d -> b s (h d)')
    w = linear(j, w_out)
    y = add(w, x)
    g = all_gather(y, axis='cp', dim=1)
    loss = linear_cross_entropy(g, table, labels)
    return loss, y
"""
ZIGZAG = """def f(x: f64[b, s, 6], *, w: f64[6] = normal(1.0), m: f64[5, 6] = normal(0.5)):
    n = rms_norm(x, w)
    a = reorder(n, dim=1, order='zigzag(2)')
    c = shard(a, axis='cp', dim=1)
    h = linear(c, m)
    g = all_gather(h, axis='cp', dim=1)
    z = reorder(g, dim=1, was='zigzag(2)', order='zigzag(5)')
    y = reorder(z, dim=1, was='zigzag(5)')
    return y
"""
REDUCED = """def mlp(x: f64[b, s, 8]):
    y = block(x, params='layers.0')
    z = block(y, params='layers.1')
    o = block(z, params='layers.0')
    return o

@layer
def block(x: f64[b, s, 8], *, norm: f64[8] = normal(1.0), w_in: f64[16@tp, 8] = normal(0.4), b_in: f64[16@tp] = normal(1.0),
          w_out: f64[8, 16@tp] = normal(0.4), b_out: f64[8] = normal(1.0)):
    h = rms_norm(x, norm)
    u = linear(h, w_in, b_in)
    a = gate(u)
    p = linear(a, w_out)
    q = all_reduce(p, axis='tp')
    r = add_bias(q, b_out)
    y = add(r, x)
    return y

@kernel
def gate(u: f64[b, s, 16@tp]):
    g = silu(u)
    y = mul(g, u)
    return y
"""
SCATTERED = """def mlp(x: f64[b, s@tp, 8], *, norm: f64[8] = normal(1.0), w_in: f64[16@tp, 8] = normal(0.4),
              w_out: f64[8, 16@tp] = normal(0.4)):
    h = rms_norm(x, norm)
    g = all_gather(h, axis='tp', dim=1)
    u = linear(g, w_in)
    a = silu(u)
    p = linear(a, w_out)
    r = reduce_scatter(p, axis='tp', dim=1)
    y = add(r, x)
    return y
"""
# a partial sum that comes in, one that goes out, and a whole value that every rank uses in a way of its own
BORDERS = """def f(x: f64[b, s, 8]+cp, z: f64[b, s@cp, 8], w: f64[6, 8@cp], *, v: f64[8@cp, 8] = normal(0.5)):
    r = all_reduce(x, axis='cp')
    h = tanh(r)
    c = shard(h, axis='cp', dim=2)
    e = linear(c, w)
    t = reduce_scatter(x, axis='cp', dim=0)
    k = linear(h, v)
    m = all_to_all(k, axis='cp', src=2, dst=1)
    y = mul(m, z)
    return e, t, y
"""
# two exchanges are under way while other work is done; the first that began is ended last
BEGUN = """def f(x: f64[b, s@cp, 6], z: f64[b, s@cp, 4], *, w: f64[6, 6] = normal(0.5)):
    g = begin_all_to_all(x, axis='cp', src=1, dst=2)
    h = begin_all_to_all(z, axis='cp', src=1, dst=2)
    u = linear(x, w)
    t = tanh(u)
    c = end_all_to_all(h, axis='cp', src=1, dst=2)
    a = end_all_to_all(g, axis='cp', src=1, dst=2)
    e = tanh(a)
    k = begin_all_to_all(e, axis='cp', src=2, dst=1)
    o = tanh(c)
    m = end_all_to_all(k, axis='cp', src=2, dst=1)
    y = mul(m, t)
    return y, o
"""
# tokens go to the ranks that hold them in zigzag order, and back
EXCHANGED = """def f(x: f64[b, s@cp, 6], w: f64[6, 6]):
    a = reorder(x, order='zigzag(2)', over='cp', by='exchange')
    c = tanh(a)
    d = reorder(c, was='zigzag(2)', over='cp', by='exchange')
    y = linear(d, w)
    return y
"""


@dataclass(frozen=True)
class Case:
    """A placed program, the mesh it runs on, and the sizes of its symbols."""

    text: str
    mesh: str
    sizes: dict[str, int]

    @property
    def graph(self) -> Graph:
        return parse(self.text)


def _move(inputs: str, equation: str) -> Case:
    return Case(f"def f({inputs}):\n    {equation}\n    return y\n", "cp=2", {})


CASES = {
    "attention": Case(ATTEND, "cp=2", {"b": 3, "s": 26}),
    "zigzag": Case(ZIGZAG, "cp=2", {"b": 3, "s": 100}),
    "borders": Case(BORDERS, "cp=2", {"b": 2, "s": 130}),
    "under way": Case(BEGUN, "cp=2", {"b": 3, "s": 26}),
    "under way, one row": Case(BEGUN, "cp=2", {"b": 1, "s": 10}),
    "reorder": Case(EXCHANGED, "cp=2", {"b": 2, "s": 20}),
    "all_to_all down": _move("x: f64[3, 6@cp, 10]", "y = all_to_all(x, axis='cp', src=1, dst=2)"),
    "all_to_all up": _move("x: f64[3, 6, 10@cp]", "y = all_to_all(x, axis='cp', src=2, dst=1)"),
    "all_to_all first": _move("x: f64[2, 5, 10@cp]", "y = all_to_all(x, axis='cp', src=2, dst=0)"),
    "all_gather first": _move("x: f64[2@cp, 63, 5]", "y = all_gather(x, axis='cp', dim=0)"),
    "all_gather last": _move("x: f64[3, 1, 10@cp]", "y = all_gather(x, axis='cp', dim=2)"),
    "reduce_scatter first": _move("x: f64[2, 65, 1]+cp", "y = reduce_scatter(x, axis='cp', dim=0)"),
    "reduce_scatter last": _move("x: f64[3, 7, 10]+cp", "y = reduce_scatter(x, axis='cp', dim=2)"),
    "all_reduce": _move("x: f64[3, 7, 5]+cp", "y = all_reduce(x, axis='cp')"),
    "shard": _move("x: f64[3, 6, 5]", "y = shard(x, axis='cp', dim=1)"),
    "mlp reduced": Case(REDUCED, "one=1,tp=2", {"b": 3, "s": 65}),
    "mlp scattered": Case(SCATTERED, "one=1,tp=2", {"b": 1, "s": 130}),
}  # fmt: skip


def tensors(case: Case) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Inputs, parameters and cotangents, the same on every rank."""
    rng, graph = torch.Generator().manual_seed(3), case.graph

    def drawn(type_: TensorType) -> Tensor:
        shape = [value(n, case.sizes) for n in type_.shape]
        if not type_.is_float:
            return torch.randint(11, shape, generator=rng)
        return torch.randn(shape, generator=rng, dtype=DTYPES[type_.dtype])

    inputs, cotangents = ([drawn(v.type) for v in values] for values in (graph.inputs, graph.outputs))
    return inputs, {k: drawn(t) for k, (t, _) in parameters(graph).items()}, cotangents


def by_autograd(case: Case, place: Place) -> dict[str, Tensor]:
    """Global results and gradients, differentiated by autograd on each rank."""
    graph = case.graph
    inputs, params, cotangents = tensors(case)
    made = gradients(graph, place, inputs, params, cotangents)
    found = {f"y{i}": (y, v.type) for i, (y, v) in enumerate(zip(made.results, graph.outputs, strict=True))}
    pairs = enumerate(zip(made.inputs, graph.inputs, strict=True))
    found |= {f"d{i}": (d, cotangent_type(v.type)) for i, (d, v) in pairs if d is not None}
    found |= {f"d_{k}": (made.params[k], cotangent_type(t)) for k, (t, _) in parameters(graph).items()}
    whole = gathered([x for x, _ in found.values()], [t for _, t in found.values()], place)
    return dict(zip(found, whole, strict=True))


def by_text(case: Case, place: Place) -> dict[str, Tensor]:
    """The same from the program whose gradients are IR, by the same names; the types say what is still to be summed."""
    graph = differentiate(case.graph)[0]
    inputs, params, cotangents = tensors(case)
    results = run(graph, place, [*inputs, *cotangents], params)
    whole = gathered(results, [v.type for v in graph.outputs], place)
    floats = [i for i, v in enumerate(case.graph.inputs) if v.type.is_float]
    names = [f"y{i}" for i in range(len(case.graph.outputs))] + [f"d{i}" for i in floats]
    return dict(zip([*names, *(f"d_{k}" for k in parameters(case.graph))], whole, strict=True))


def every_form(x: Tensor) -> Tensor:
    """A chain of all the forms, with something to save between them; x is split along dim 1 and odd elsewhere."""
    begun = UNDER_WAY_FORMS["begin_all_to_all"](x, axis="cp", src=1, dst=2)
    a = x.cos().sum() * UNDER_WAY_FORMS["end_all_to_all"](begun, axis="cp", src=1, dst=2).sin()
    b = FORMS["all_to_all"](a, axis="cp", src=2, dst=1)
    c = FORMS["reorder"](FORMS["all_gather"](b, axis="cp", dim=1), order="zigzag(2)").sin()
    d = FORMS["shard"](c, axis="cp", dim=1) * x
    e = FORMS["all_reduce"](d, axis="cp").sin()
    return FORMS["reduce_scatter"](e * c.narrow(1, 0, e.shape[1]), axis="cp", dim=1)


def compiled(place: Place) -> dict[str, Tensor]:
    """Results and gradients of all forms, eager and under one graph, at two lengths."""
    found = dict[str, Tensor]()
    fast = torch.compile(every_form, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (100, 68):
        x = torch.randn(3, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(place.rank))
        for name, fn in {"eager": every_form, "compiled": fast}.items():
            leaf = x.clone().requires_grad_()
            y = fn(leaf)
            (d,) = torch.autograd.grad(y, leaf, torch.cos(y.detach()))
            found |= {f"{name} {length} y": y.detach(), f"{name} {length} d": d}
    return found


def error_of(step: Callable[[], object]) -> list[str]:
    """The type and the text of what a step raises."""
    try:
        step()
    except PlaitError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def disagreements(rank: int, stores: str) -> dict[str, list[str]]:
    """What joining says to ranks that are too few, of two meshes, or alone."""
    found = {"world": error_of(lambda: init("cp=3", store=f"{stores}-none"))}
    for name, meshes in {"axes": ["cp=2", "tp=2"], "shape": ["cp=2,tp=1", "cp=1,tp=2"]}.items():
        found[name] = error_of(lambda mesh=meshes[rank], at=f"{stores}-{name}": init(mesh, store=at, timeout=WAIT))
        close()
    found["alone"] = error_of(lambda: init("cp=2", store=f"{stores}-alone{rank}", timeout=1.0))
    return found


def quarrels(place: Place) -> dict[str, list[str]]:
    """What running says to ranks that have other programs, other sizes or other trouble."""
    case, attention, mlp = CASES["zigzag"], CASES["attention"], CASES["mlp reduced"]
    given = tensors(case)[1]

    def ran(mine: Case, params: dict[str, Tensor] | None = None) -> list[str]:
        inputs, own, _ = tensors(mine)
        return error_of(lambda: run(mine.graph, place, inputs, own if params is None else params))

    def apart(second: Case) -> list[str]:
        return ran(second if place.rank else case)

    w = torch.ones(6, dtype=torch.float64)
    return {
        "program": apart(replace(case, text=case.text.replace("zigzag(5)", "zigzag(25)"))),
        "length": apart(replace(case, sizes={"b": 3, "s": 60})),
        "dtype": apart(replace(case, text=case.text.replace("f64", "f32"))),
        "missing": ran(case, {k: x for k, x in given.items() if k != "m" or place.rank == 0}),
        "misfit": ran(case, given | {"w": torch.ones(7, dtype=torch.float64)}),
        "drawn apart": ran(case, given | {"w": w * place.rank}),
        "uneven": ran(replace(attention, sizes={"b": 3, "s": 25})),
        "no axis": ran(mlp),
        "still fine": ran(case),
        "odd zigzag": ran(replace(case, sizes={"b": 3, "s": 101})),
    }


def main(out: Path) -> None:
    rank, stores = launched().rank, f"file://{out}/store"
    report = {"joining": disagreements(rank, stores)}
    numbers = dict[str, Tensor]()
    for i, mesh in enumerate(dict.fromkeys(case.mesh for case in CASES.values())):
        place = init(mesh, store=f"{stores}{i}", timeout=WAIT)
        for name, case in CASES.items():
            for way in (by_autograd, by_text) if case.mesh == mesh else ():
                numbers |= {f"{name}/{way.__name__}/{k}": x.contiguous() for k, x in way(case, place).items()}
        if "cp" in place.groups:
            numbers |= {f"forms/{k}": x.contiguous() for k, x in compiled(place).items()}
            report["running"] = quarrels(place)
        close()
    place = init("cp=2", store=f"{stores}-left", timeout=WAIT)
    report["left"] = {"": error_of(lambda: handshake(place, {"a": "b"})) if rank == 0 else []}
    save_file(numbers, out / f"rank{rank}.safetensors")
    (out / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
