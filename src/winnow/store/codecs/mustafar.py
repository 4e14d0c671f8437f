"""Keys and values without their smallest elements; decoding reads them as they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.bitmap_decode import bitmap_decode, expand, pack
from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.protocol import Decoded, Plane
from winnow.types import AttentionSpec, Partial, Segment, Selection

__all__ = ["Mustafar"]


class Mustafar(Decoded):
    """Of every token's K and V the elements of the largest magnitude, under a bit mask (arXiv 2505.22913).

    The form of Mustafar, laid out by token: ``D - floor(D * percent / 100)`` values in the model's type and
    ``D / 8`` bytes of mask, for K and for V alike. A row's size does not depend on its content, so
    nothing is padded and no offsets are kept.

    Parameters
    ----------
    percent : int
        Elements that are left out, of a hundred: 0 to 99.
    """

    def __init__(self, percent: int):
        if not 0 <= percent <= 99:
            raise ValueError(f"codec 'mustafar:{percent}' leaves nothing; give at most 'mustafar:99'")
        self.percent = percent
        self.name = f"mustafar:{percent}"

    def _kept(self, head_dim: int) -> int:
        return head_dim - head_dim * self.percent // 100

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        if head_dim % 8:
            raise ValueError(
                f"codec {self.name!r}: the bits of {head_dim} channels fill no bytes; use 'int8'"
            )
        kept, bits = self._kept(head_dim), head_dim // 8
        return (
            Plane(name="k_values", dtype=dtype, width=kept),
            Plane(name="k_mask", dtype=torch.uint8, width=bits),
            Plane(name="v_values", dtype=dtype, width=kept),
            Plane(name="v_mask", dtype=torch.uint8, width=bits),
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        kept = self._kept(k.shape[-1])
        return (*pack(k, kept), *pack(v, kept))

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_values, k_mask, v_values, v_mask = rows
        return expand(k_values, k_mask).to(dtype), expand(v_values, v_mask).to(dtype)

    def attend(
        self,
        q_HD: Tensor,
        segment: EncodedSegment,
        *,
        spec: AttentionSpec,
        position: int,
        selection: Selection | None,
        want_logits: bool,
        backend: Backend,
    ) -> Partial | None:
        """Attention over the packed rows."""
        _, k_mask, _, v_mask = segment.rows
        return bitmap_decode(
            q_HD,
            segment.derived("packed", _packed),
            (k_mask, v_mask),
            spec=spec,
            position=position,
            selection=selection,
            want_logits=want_logits,
            backend=backend,
        )


def _packed(segment: EncodedSegment) -> Segment:
    """The values that are stored, in place of keys and values."""
    k_values, _, v_values, _ = segment.rows
    return segment.seen_as(k_values, v_values)
