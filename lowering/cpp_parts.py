"""A kernel that begins with a short convolution, in two parts: the op, which has C++ of its own, and rows behind it."""

from __future__ import annotations

from functools import lru_cache

from ..ir import Builder, Graph, Replay, Value


@lru_cache(maxsize=1024)
def parted(kernel: Graph) -> Graph:
    """The kernel as its convolutions and, behind them, one kernel of all else; itself where it is not of that kind."""
    first = [n for n in kernel.nodes if n.is_op("causal_conv1d") and all(v in kernel.inputs for v in n.operands)]
    rest = [n for n in kernel.nodes if n not in first]
    made = {v for n in rest for v in n.outputs}
    given = [v for v in dict.fromkeys(kernel.outputs) if v in made]
    if not first or not given or any(n.is_op("causal_conv1d") or n.callee for n in rest):
        return kernel
    needed = list(dict.fromkeys(v for n in rest for v in n.operands if v not in made))
    inner = Builder(kernel.name, "kernel")
    env: dict[Value | None, Value | None] = {None: None, **{v: inner.input(v.name, v.type) for v in needed}}
    for node in rest:
        env.update(zip(node.outputs, inner.again(node, [env[v] for v in node.inputs]), strict=True))
    rows = inner.finish(v for v in (env[v] for v in given) if v is not None)
    replay = Replay(kernel)
    for node in first:
        replay.env.update(zip(node.outputs, replay.keep(node), strict=True))
    found = replay.builder.emit(rows, [replay.env[v] for v in needed], names=[v.name for v in given], loc=rest[-1].loc)
    replay.env.update(zip(given, found, strict=True))
    return replay.builder.finish(replay.env[v] for v in kernel.outputs)
