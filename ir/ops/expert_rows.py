"""Rows on their way to the ranks that have their experts, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..op import OpDef, op
from .token_wise import token_wise

Tensor = torch.Tensor


@op("rows[n d], counts:i64[e] -> sent[n d]", map="d", whole="n e", linear="rows", over="n")
def send_rows(rows: Tensor, counts: Tensor) -> Tensor:
    """Every row goes to the rank that has its expert, and stands by expert there; `counts` are of a rank's rows before"""
    return rows


@op("sent[n d], counts:i64[e] -> rows[n d]", map="d", whole="n e", linear="sent", over="n")
def return_rows(sent: Tensor, counts: Tensor) -> Tensor:
    """Every row goes back to the rank whose token it is of: what undoes send_rows"""
    return sent


def _own_types(made: OpDef) -> None:
    """Rows stay as many and as split: ranks have others, and not as many of them, which letters cannot say."""
    assert made.crossing is not None
    made.crossing = replace(made.crossing, typed=True)
    token_wise(made)


def _sample(sample: Any) -> list[Any]:
    return [sample.randn(7, 4), torch.tensor([3, 0, 4])]


for _op in (send_rows, return_rows):
    _own_types(_op)
    _op.samples(_sample)

send_rows.vjp("d_rows = return_rows(d_sent, counts, over=over, by=by, order=order)")
return_rows.vjp("d_sent = send_rows(d_rows, counts, over=over, by=by, order=order)")
