"""Which form runs an op on a target; no entry means the op's reference runs, under `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..ir import OPS, Node, OpDef
from . import attending, forms
from .cpp import attention as cpp_attention
from .cpp import remark
from .forms.collectives import COLLECTIVE_FORMS, MOVING
from .forms.crossing import crossing_form
from .forms.under_way import UNDER_WAY_FORMS
from .recurrent import faces

TARGETS = ("cpu", "reference", "cuda", "interpreter")


@dataclass(frozen=True)
class Form:
    """A fast implementation with its op's own call shape, and the reason it is chosen."""

    run: Callable[..., Any]
    why: str
    generated: bool = False  # C++ where a compiler is found, else torch code
    instead: Callable[[Node], Form | None] | None = None  # what runs a node that is another form's, and why it does

    @property
    def reason(self) -> str:
        """Why, and what the machine at hand adds to it."""
        return f"{self.why}; {remark()}" if self.generated else self.why


_CHUNKED = "chunked and matmul-rich, opaque to Dynamo"
_ATTENTION = "blocks of keys that all heads of a group share, hidden ones left out; a few tokens by SDPA"


def _attention_on_cpu(node: Node) -> Form | None:
    """SDPA, or blocks in torch, for what C++ is not made for."""
    q, _, v, *_ = (None if x is None else x.type for x in node.inputs)
    assert q is not None and v is not None
    widths = [x.dims[3].size for x in (q, v)]
    if q.dtype == "f64" or any(isinstance(n, int) and n > cpp_attention.WIDEST for n in widths):
        return Form(
            forms.attention, f"SDPA, masks in blocks of queries: C++ takes no {q.dtype} heads of {widths[0]} and {widths[1]}"
        )
    return None


_CPU: dict[str, Form] = {
    "linear": Form(forms.linear, "half precision through float32 where the processor has no instructions for it"),
    "gated_delta_rule": Form(forms.gated_delta_rule, _CHUNKED, generated=True),
    "delta_rule": Form(forms.delta_rule, _CHUNKED, generated=True),
    "kimi_delta_attention": Form(forms.kimi_delta_attention, _CHUNKED, generated=True),
    "ssd": Form(forms.ssd, _CHUNKED, generated=True),
    "gated_linear_attention": Form(forms.gated_linear_attention, _CHUNKED, generated=True),
    "retention": Form(forms.retention, _CHUNKED, generated=True),
    "gated_delta_final": Form(forms.gated_delta_final, _CHUNKED, generated=True),
    "kimi_delta_final": Form(forms.kimi_delta_final, _CHUNKED, generated=True),
    "selective_scan": Form(forms.selective_scan, "channels side by side, opaque to Dynamo", generated=True),
    "rg_lru": Form(forms.rg_lru, "channels side by side, opaque to Dynamo", generated=True),
    "causal_conv1d": Form(forms.causal_conv1d, "channels last, with a backward of its own", generated=True),
    "attention": Form(forms.attention, _ATTENTION, generated=True, instead=_attention_on_cpu),
    "biased_attention": Form(forms.biased_attention, "blocks of keys, a bias is read by distance", generated=True),
    "attention_part": Form(forms.attention_part, "torch's flash kernel on runs of places, else masks in blocks of queries"),
    "attention_part_gradients": Form(forms.attention_part_gradients, "as its forward, told the denominators of all parts"),
    "cache_write": Form(forms.cache_write, "in place: the cache that is read is dead"),
    "cached_write": Form(forms.cached_write, "in place: the cache that is read is dead"),
    "page_write": Form(forms.page_write, "in place: the pool that is read is dead"),
    "cached_attention": Form(forms.cached_attention, "each row's own part of its ring, as attention's blocks"),
    "paged_attention": Form(forms.paged_attention, "pages side by side are read where they lie, others a few at a time"),
    "route": Form(forms.route, "top-k on integer keys that are unique, so that ties have one answer"),
    "dispatch": Form(forms.dispatch, "one stable sort"),
    "grouped_linear": Form(forms.grouped_linear, "a GEMM per expert that has rows"),
    "combine": Form(forms.combine, "a gather and a sum, no atomics"),
    "load_balance_loss": Form(forms.load_balance_loss, "counts by comparison, no data-dependent size"),
    "z_loss": Form(forms.z_loss, "one pass"),
    "cross_entropy": Form(forms.cross_entropy, "softmax recomputed in the backward"),
    "linear_cross_entropy": Form(forms.linear_cross_entropy, "in blocks of tokens, the logits never exist"),
    "linear_token_losses": Form(forms.linear_token_losses, "in blocks of tokens, the logits made again in the backward"),
    "head_parts": Form(forms.head_parts, "in blocks of tokens, the logits made again in the backward"),
}


def _attention_on_cuda(node: Node) -> Form:
    """SDPA where its own kernels know the mask; generated kernels where it would have to be made."""
    if why := attending.left(node):
        return Form(forms.device.attention, why)
    return Form(attending.faces(interpreted=False)["attention"], attending.taken(node))


_CUDA: dict[str, Form] = {
    **{name: form for name, form in _CPU.items() if name not in ("linear", "biased_attention")},
    "attention": Form(
        attending.faces(interpreted=False)["attention"], "generated Triton where SDPA has no kernel", instead=_attention_on_cuda
    ),
    **{
        name: Form(
            attending.faces(interpreted=False)[name], "generated Triton where no row kernel is: segments, a state in or out"
        )
        for name in ("causal_conv1d", "anticausal_conv1d", "conv1d_taps")
    },
    "selective_scan": Form(forms.selective_scan, "blocks of tokens side by side, opaque to Dynamo"),
    "grouped_linear": Form(forms.device.grouped_linear, "few rows fetch their matrices, many are a GEMM per expert"),
    **{
        name: Form(run, "generated Triton, float32 as three products of tf32; float64 and wider keys are torch code")
        for name, run in faces(interpreted=False).items()
    },
}
_INTERPRETED = _CUDA | {
    name: Form(run, "generated Triton, interpreted")
    for name, run in (faces(interpreted=True) | attending.faces(interpreted=True)).items()
}
_PLACED = {
    name: Form(run, "the ranks of a mesh axis, through torch.distributed")
    for name, run in (COLLECTIVE_FORMS | UNDER_WAY_FORMS).items()
}
# What runs beside exchanges, which torch.compile does not see.
_EAGER = {
    "anticausal_conv1d": Form(forms.stencils.anticausal_conv1d, "a shifted product per tap"),
    "conv1d_taps": Form(forms.stencils.conv1d_taps, "a sum per tap"),
}
_FORMS = {"cpu": _CPU | _PLACED, "reference": _PLACED, "cuda": _CUDA | _PLACED, "interpreter": _INTERPRETED | _PLACED}


def form_of(op: OpDef, target: str) -> Form | None:
    """The form that runs `op` on `target`, or None for its reference."""
    return _FORMS[target].get(op.name)


def targets_of(op: OpDef) -> dict[str, Form]:
    """Every target with a form of this op."""
    return {t: f for t in TARGETS if (f := form_of(op, t))}


def choose(node: Node, target: str) -> tuple[Callable[..., Any], str, str]:
    """What runs a node: the callable, its name, and why."""
    op = OPS[node.op.name]
    if node.attrs.get("over"):
        why = f"{node.attrs['by']} over {node.attrs['over']}, ranks' own tensors by the forms there are"
        return _crossing(op, target), f"crossing.{op.name}", why
    form = form_of(op, target)
    if form is None:
        return op.reference, f"{op.name} (reference)", "fused with its neighbours by torch.compile"
    form = (form.instead(node) if form.instead else None) or form
    return form.run, f"{form.run.__module__.rpartition('.')[2]}.{op.name}", form.reason


def standing(node: Node) -> dict[str, str]:
    """What an exchange is told besides its op's attributes: where it stands, for the day when a rank is lost."""
    return {"at": node.loc} if node.loc and (node.is_op(*MOVING, *UNDER_WAY_FORMS) or node.attrs.get("over")) else {}


@cache
def _crossing(op: OpDef, target: str) -> Callable[..., Any]:
    """An op over split tokens: what a rank does alone goes by the target's forms."""

    def run(inner: OpDef, *operands: Any, **attrs: Any) -> Any:
        form = form_of(inner, target) or (None if target == "reference" else _EAGER.get(inner.name))
        return (form.run if form else inner.reference)(*operands, **attrs)

    return crossing_form(op, run)
