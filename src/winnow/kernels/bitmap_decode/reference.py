"""Decode attention over packed rows in plain PyTorch: expand, then attend."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from winnow.kernels.decode import reference as dense
from winnow.types import AttentionSpec, Partial, Segment, Selection

from .form import expand

__all__ = ["bitmap_decode"]


def bitmap_decode(
    q_HD: Tensor,
    packed: Segment,
    masks: tuple[Tensor, Tensor],
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    want_logits: bool,
) -> Partial:
    longest = int(packed.lengths.max()) if packed.heads else 0
    k, v = (
        expand(values[:, :longest], mask[:, :longest])
        for values, mask in zip((packed.k, packed.v), masks, strict=True)
    )
    return dense.decode(q_HD, replace(packed, k=k, v=v), spec, position, selection, want_logits)
