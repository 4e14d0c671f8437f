"""Decode attention over keys and values of which only some elements are stored, under a bit mask.

The attention reads the stored form: a row's values and its mask come from memory, the zeros between them
never do.
"""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose
from winnow.types import AttentionSpec, Partial, Segment, Selection

from . import native, reference
from .form import expand, pack

__all__ = ["bitmap_decode", "expand", "pack"]


def bitmap_decode(
    q_HD: Tensor,
    packed: Segment,
    masks: tuple[Tensor, Tensor],
    *,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None = None,
    want_logits: bool = False,
    backend: Backend = "auto",
) -> Partial:
    """As :func:`winnow.kernels.decode.decode`, over packed rows.

    Parameters
    ----------
    q_HD : Tensor
        ``[H * G, D]`` post-RoPE queries, ``D`` a multiple of 8.
    packed : Segment
        Its ``k`` and ``v`` are ``[H, C, n]``: the ``n`` elements of each row that are stored, in the order
        of their channels.
    masks : tuple of Tensor
        ``[H, C, D / 8]`` uint8 for K and for V, contiguous in their last two dimensions. Bit ``d % 8``
        of byte ``d // 8`` says that element ``d`` is stored; ``n`` bits of every valid row are set.
    spec, position, selection, want_logits, backend
        As in ``decode``.

    Returns
    -------
    Partial
    """
    why = native.unsupported(q_HD, packed, masks, spec)
    chosen = choose("bitmap_decode", backend, q_HD.device, unsupported=why)
    if chosen == "native":
        return native.bitmap_decode(q_HD, packed, masks, spec, position, selection, want_logits)
    if chosen == "triton":
        from . import triton

        return triton.bitmap_decode(q_HD, packed, masks, spec, position, selection, want_logits)
    return reference.bitmap_decode(q_HD, packed, masks, spec, position, selection, want_logits)
