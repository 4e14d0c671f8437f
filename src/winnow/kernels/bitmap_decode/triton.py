"""Packed rows in the Triton decode kernel, which finds each element by counting the bits before it."""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.decode import triton as dense
from winnow.types import AttentionSpec, Partial, Segment, Selection

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
    """As :func:`winnow.kernels.bitmap_decode.bitmap_decode`, on the device of the queries."""
    return dense.decode(q_HD, packed, spec, position, selection, want_logits, masks)
