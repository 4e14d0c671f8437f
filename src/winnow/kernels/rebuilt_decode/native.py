"""Keys that are a product in the native decode kernel (csrc/rebuild.h), which rebuilds a block at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.kernels.decode import native as dense
from winnow.types import AttentionSpec, Factors, Partial, Segment, Selection

from .form import Turning

__all__ = ["rebuilt_decode", "unsupported"]


def unsupported(q_HD: Tensor, stored: Segment, factors: Factors, spec: AttentionSpec) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    if why := dense.unsupported(q_HD, stored, spec):
        return why
    left, right = factors.left, factors.right
    if left.dtype != q_HD.dtype or right.dtype != q_HD.dtype:
        return "queries and factors differ in dtype"
    if left.shape[1] % 2:
        return f"the rank {left.shape[1]} is odd"
    if left.stride(1) != 1 or not right[0].is_contiguous():
        return "a factor is not contiguous"
    return ""


def rebuilt_decode(
    q_HD: Tensor,
    stored: Segment,
    factors: Factors,
    turning: Turning,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    want_logits: bool,
) -> Partial:
    """As :func:`winnow.kernels.rebuilt_decode.rebuilt_decode`; the operands passed :func:`unsupported`."""
    left, right, partner = factors.left, factors.right, turning.partner
    native = extension()
    assert native is not None
    entry = partial(
        native.rebuilt_decode,
        left.data_ptr(),
        left.stride(0),
        factors.start,
        right.data_ptr(),
        right.stride(0),
        left.shape[1],
        turning.coarse.data_ptr(),
        turning.fine.data_ptr(),
        turning.start,
        0 if partner is None else partner.data_ptr(),
    )
    logits_NS = None
    if want_logits:
        logits_NS = torch.full((q_HD.shape[0], dense.longest(stored)), -torch.inf)
    result = dense.call(entry, logits_NS, q_HD, stored, spec, position, selection, None)
    return result if logits_NS is None else replace(result, logits=logits_NS)
