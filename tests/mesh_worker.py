"""One rank of the models in test_mesh_models: compiles, runs, saves and breaks them, and leaves numbers and errors in files."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from plait import api
from plait.ir import PlaitError, parse
from plait.lowering import lower
from plait.lowering.forms.traffic import count_anew, traffic
from plait.runtime.layout import layout_of, whole_tensors
from plait.runtime.mesh import close, here, init, launched, within
from plait.runtime.module import CompiledModel
from plait.runtime.placed import PlacedModel
from safetensors.torch import save_file

Tensor = torch.Tensor
WAIT = 60.0
VOCAB = 24


@dataclass(frozen=True)
class Case:
    """A model, how it is placed, and the lengths of packed segments where it is packed."""

    pattern: str
    mesh: str = "cp=2"
    place: str = ""
    segments: tuple[int, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of `compile`, on the mesh


CASES = {
    "heads": Case("M*G"),
    "gathered": Case("*-E", place="attention=gather recurrence=gather"),
    "packed": Case("M*G", segments=(7, 0, 12, 5)),
    "dropout": Case("*-", spec={"dropout": 0.25}),
    "ring in zigzag": Case("*G", place="attention=ring order=zigzag"),
    "chain": Case("MG", place="recurrence=chain"),
    "kv, packed": Case("*", place="attention=kv", segments=(3, 14, 0, 7)),
    "row kernels": Case("-", options={"target": "interpreter", "dtype": "f32"}),
    "rows": Case("M*E", mesh="dp=2"),
    "features": Case("M*G", mesh="tp=2"),
    "experts": Case("E*", mesh="ep=2"),
}


def fields(case: Case) -> dict[str, Any]:
    """The fields of a small spec."""
    return {
        "name": "small", "vocab": VOCAB, "hidden": 16, "pattern": case.pattern, "tied": True,
        "mamba2": {"heads": 4, "head_dim": 8, "state": 8, "groups": 2}, "attention": {"heads": 4, "head_dim": 4},
        "gdn": {"key_heads": 2, "value_heads": 4, "key_dim": 4, "value_dim": 4}, "mlp": {"width": 16},
        "moe": {"experts": 4, "top_k": 2, "width": 8}, **case.spec,
    }  # fmt: skip


def batch(case: Case) -> tuple[Tensor, Tensor | None]:
    """Tokens and borders, the same on every rank."""
    rng = torch.Generator().manual_seed(7)
    if not case.segments:
        return torch.randint(VOCAB, (2, 20), generator=rng), None
    ends = torch.tensor([0, *case.segments]).cumsum(0)
    return torch.randint(VOCAB, (1, int(ends[-1])), generator=rng), ends


def compiled(case: Case, **options: Any) -> CompiledModel:
    return api.compile(fields(case), **{"dtype": "f64", "jit": False, "seed": 5, **options})


def measured(model: CompiledModel, case: Case) -> dict[str, Tensor]:
    """Loss, logits and the gradient of every parameter, as users get them."""
    tokens, cu = batch(case)
    model.zero_grad(set_to_none=True)
    loss = model.loss(tokens, cu=cu, seed=torch.tensor(3))
    loss.backward()
    found = {"loss": loss.detach(), "logits": model.eval().whole_logits(tokens, cu).detach()}
    model.train()
    return found | gradients(model)


def gradients(model: CompiledModel) -> dict[str, Tensor]:
    """Of whole parameters, in their natural order."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {f"d {name}": x for name, x in whole_tensors(model.layout, found, {name: name for name in found}).items()}


def by_parts(model: PlacedModel, case: Case) -> dict[str, Tensor]:
    """The same from the part of the batch that shard_batch makes."""
    tokens, cu = batch(case)
    model.zero_grad(set_to_none=True)
    loss = model.loss(*api.shard_batch(model, tokens, cu=cu), seed=torch.tensor(3), local=True)
    (2 * loss).backward()
    return {"loss": loss.detach()} | {name: x / 2 for name, x in gradients(model).items()}


def models() -> dict[str, Tensor]:
    """Every case on the mesh that is joined."""
    found, joined = dict[str, Tensor](), here().mesh
    for name, case in CASES.items():
        if case.mesh.partition("=")[0] in joined:
            model = compiled(case, mesh=case.mesh, place=case.place, **case.options)
            assert isinstance(model, PlacedModel)
            found |= {f"{name}/whole/{k}": x for k, x in measured(model, case).items()}
            found |= {f"{name}/part/{k}": x for k, x in by_parts(model, case).items()}
    return found


def trained(model: CompiledModel, name: str) -> dict[str, Tensor]:
    """A loss, its gradients, and how much moved for them."""
    count_anew()
    loss = model.loss(batch(Case("*"))[0])
    loss.backward()
    counted = traffic()["cp"]
    found = {f"{name}/{n}": x for n, x in gradients(model).items()}
    return found | {f"{name}/loss": loss.detach(), f"{name}/moved": torch.tensor([counted.calls, counted.bytes])}


# -- data parallel by torch -------------------------------------------------------------------


def rows(rank: int) -> Tensor:
    return batch(Case("M*"))[0][rank : rank + 1]


def by_torch() -> dict[str, Tensor]:
    """Gradients under DistributedDataParallel and fully_shard: each process calls a model of one process on its own rows."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    place, case = here(), Case("M*")
    assert place.devices is not None
    replicated = DistributedDataParallel(compiled(case), process_group=place.devices.get_group("dp"))
    tokens = rows(place.rank)
    labels = torch.roll(tokens, -1, 1)
    replicated(tokens, labels=labels).backward()
    found = {f"ddp/whole/d {n}": p.grad for n, p in replicated.module.named_parameters() if p.grad is not None}
    sharded = fully_shard(compiled(case), mesh=place.devices["dp"])
    optimizer = torch.optim.SGD(sharded.parameters(), 1.0)
    before = {n: p.full_tensor().clone() for n, p in sharded.named_parameters()}  # type: ignore[attr-defined] # a DTensor
    sharded(tokens, labels=labels).backward()
    optimizer.step()
    after = {n: p.full_tensor() for n, p in sharded.named_parameters()}  # type: ignore[attr-defined] # a DTensor
    return {k: x.clone() for k, x in found.items()} | {f"fsdp/whole/d {n}": before[n] - after[n] for n in before}


# -- checkpoints ------------------------------------------------------------------------------

SPLIT = """def model(tokens: i64[b, s], labels: i64[b, s], *, table: f64[24@tp, 8] = normal(1.0),
              w_in: f64[24@tp:sections(2,8,4,12), 8] = normal(0.4), w_out: f64[8, 24@tp:sections(2,8,4,12)] = normal(0.4),
              norm: f64[8] = normal(1.0)):
    t = all_gather(table, axis='tp', dim=0)
    x = embedding(t, tokens)
    h = rms_norm(x, norm)
    u = linear(h, w_in)
    p = linear(u, w_out)
    r = all_reduce(p, axis='tp')
    y = add(r, x)
    loss = linear_cross_entropy(y, t, labels)
    return loss
"""
WHOLE = SPLIT
for here_alone, everywhere in {
    "@tp": "", ":sections(2,8,4,12)": "", "all_gather(table, axis='tp', dim=0)": "widen(table)",
    "all_reduce(p, axis='tp')": "widen(p)",
}.items():  # fmt: skip
    WHOLE = WHOLE.replace(here_alone, everywhere)


def handmade(mesh: str) -> CompiledModel:
    """A model with sections split over ranks, or all of it where there is no mesh."""
    whole = parse(WHOLE)
    if not mesh:
        return CompiledModel(whole, lambda _: lower(whole), compiled=False, seed=9)
    placed = parse(SPLIT)
    layout = layout_of(placed, here(), within(here(), here().mesh))
    return PlacedModel(whole, lambda _: lower(placed), layout, compiled=False, seed=9)


def stored(out: Path) -> dict[str, Tensor]:
    """A model in parts: its gradients, and files that one process reads."""
    model, tokens = handmade("tp=2"), batch(Case("M"))[0]
    loss = model.loss(tokens)
    loss.backward()
    model.save_sharded(out / "shards")
    model.save(out / "mesh.safetensors")
    found = {f"split/{n}": p.detach().clone() for n, p in model.named_parameters()}
    shards, one = (partial(model.load_sharded, out / folder) for folder in ("shards", "one"))
    for read in (shards, one, partial(model.load, out / "mesh.safetensors")):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        read()
        assert all(torch.equal(p, found[f"split/{n}"]) for n, p in model.named_parameters())
    gradients = {f"split/d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | gradients | {"split/loss": loss.detach()}


# -- what cannot be ---------------------------------------------------------------------------


def error_of(step: Callable[[], object]) -> list[str]:
    """The type and the text of what a step raises."""
    try:
        step()
    except PlaitError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def quarrels(out: Path) -> dict[str, list[str]]:
    """What every rank says where they do not fit together."""
    case, rank = CASES["packed"], here().rank
    model, (tokens, cu) = compiled(case, mesh="cp=2"), batch(case)
    assert cu is not None
    apart = torch.tensor([0, 8, 24]) if rank else torch.tensor([0, 4, 24])
    dense, own = batch(Case("M"))[0], torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(rank))
    return {
        "cu": error_of(lambda: model.loss(tokens, cu=apart)),
        "cu and tokens": error_of(lambda: model.loss(tokens, cu=cu[:-1])),
        "odd length": error_of(lambda: model.loss(dense[:, :19])),
        "one rank's length": error_of(lambda: model.loss(dense[:, : 20 - 2 * rank])),
        "one rank's token": error_of(lambda: model.loss(dense + VOCAB * rank)),
        "one rank's labels": error_of(lambda: model.loss(dense, dense[:, : 20 - rank])),
        "other tokens": error_of(lambda: model.loss(own)),
        "parts without labels": error_of(lambda: model.loss(dense, local=True)),
        "specs": error_of(lambda: compiled(Case("M*G" if rank else "M**"), mesh="cp=2")),
        "seeds": error_of(lambda: api.compile(fields(case), mesh="cp=2", seed=rank)),
        "axis": error_of(lambda: compiled(case, mesh="cp=4")),
        "remedy": error_of(lambda: compiled(case, mesh="cp=2", place="attention=nothing")),
        "generation": error_of(lambda: model.generate(dense, 3)),
        "one rank's folder": error_of(lambda: model.save(out / "none" if rank else out)),
        "no shards": error_of(lambda: model.load_sharded(out / "absent")),
        "still fine": error_of(lambda: model.loss(dense)),
    }


def _die_at_the_next_exchange(after: float) -> None:
    """As a process does that hangs so many seconds in it and is killed."""

    def last(*operands: object) -> None:
        time.sleep(after)
        os._exit(0)

    cast(Any, torch.ops)._c10d_functional.all_to_all_single = last


def lost(out: Path) -> None:
    """The second rank does not come to a layer; what the first one says, and how soon."""
    place = init("cp=2", store=f"file://{out}/store-lost", timeout=5.0)
    model = compiled(CASES["heads"], mesh="cp=2")
    tokens = batch(CASES["heads"])[0]
    model.loss(tokens).backward()
    if place.rank:
        _die_at_the_next_exchange(after=9.0)
    start = time.monotonic()
    said = error_of(lambda: model.loss(tokens).backward())
    (out / "lost.json").write_text(json.dumps([*said, time.monotonic() - start]))
    os._exit(0)


def every_model(out: Path) -> None:
    """Numbers of all cases and what ranks say, each mesh in turn."""
    stores, numbers = f"file://{out}/store", dict[str, Tensor]()
    init("cp=2", store=f"{stores}-cp", timeout=WAIT)
    numbers |= models()
    report = quarrels(out)
    close()
    init("dp=2", store=f"{stores}-dp", timeout=WAIT)
    numbers |= models() | by_torch()
    close()
    init("tp=2", store=f"{stores}-tp", timeout=WAIT)
    numbers |= models() | stored(out)
    close()
    init("ep=2", store=f"{stores}-ep", timeout=WAIT)
    numbers |= models()
    close()
    _leave(out, numbers, report)
    lost(out)


def one_compiled(out: Path) -> None:
    place = init("cp=2", store=f"file://{out}/store", timeout=WAIT)
    model, eager = (api.compile(fields(Case("*")), dtype="f32", seed=5, mesh="cp=2", jit=jit) for jit in (True, False))
    _leave(out, trained(model, "compiled") | trained(eager, "eager"), {})
    tokens = batch(Case("*"))[0]
    if place.rank:
        _die_at_the_next_exchange(after=0.0)
    said = error_of(lambda: model.loss(tokens).backward())
    (out / "lost.json").write_text(json.dumps(said))
    os._exit(0)


def _leave(out: Path, numbers: dict[str, Tensor], report: dict[str, list[str]]) -> None:
    rank = launched().rank
    save_file({k: x.contiguous() for k, x in numbers.items()}, out / f"rank{rank}.safetensors")
    (out / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"models": every_model, "compiled": one_compiled}[sys.argv[1]](Path(sys.argv[2]))
