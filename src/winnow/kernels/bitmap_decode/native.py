"""Packed rows in the native decode kernel (csrc/decode.cpp), which expands a block of them at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.decode import native as dense
from winnow.types import AttentionSpec, Partial, Segment, Selection

__all__ = ["bitmap_decode", "unsupported"]


def unsupported(q_HD: Tensor, packed: Segment, masks: tuple[Tensor, Tensor], spec: AttentionSpec) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    if why := dense.unsupported(q_HD, packed, spec):
        return why
    for mask in masks:
        if mask.dtype != torch.uint8 or mask.shape[2] * 8 != q_HD.shape[1]:
            return f"a mask is {mask.dtype} {tuple(mask.shape)}, not uint8 of {q_HD.shape[1]} bits a row"
        if mask.stride(2) != 1 or mask.stride(1) != mask.shape[2]:
            return "the rows of a mask do not lie one after the other"
    return ""


def bitmap_decode(
    q_HD: Tensor,
    packed: Segment,
    masks: tuple[Tensor, Tensor],
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    want_logits: bool,
) -> Partial:
    """As :func:`winnow.kernels.bitmap_decode.bitmap_decode`; the operands passed :func:`unsupported`."""
    return dense.decode(q_HD, packed, spec, position, selection, want_logits, masks)
