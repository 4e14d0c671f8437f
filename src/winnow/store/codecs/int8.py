"""Eight bits, one scale per token: half of bfloat16, and nearly always without effect on answers."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.coded_decode import Coded, Codes
from winnow.kernels.quantize import Quantized, dequantize, quantize
from winnow.store.codecs.coded import ReadAsCodes
from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.protocol import Plane

__all__ = ["Int8"]


class Int8(ReadAsCodes):
    """K and V in 8 bits, symmetric, one scale per token each."""

    name = "int8"

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return (
            Plane(name="k_codes", dtype=torch.uint8, width=head_dim),
            Plane(name="k_scale", dtype=torch.bfloat16, width=1),
            Plane(name="v_codes", dtype=torch.uint8, width=head_dim),
            Plane(name="v_scale", dtype=torch.bfloat16, width=1),
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        of_k, of_v = (quantize(x, bits=8, axis="token", group=x.shape[-1], symmetric=True) for x in (k, v))
        return of_k.codes, of_k.scale, of_v.codes, of_v.scale

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_codes, k_scale, v_codes, v_scale = rows
        return _decode(k_codes, k_scale, dtype), _decode(v_codes, v_scale, dtype)

    def coded(self, segment: EncodedSegment) -> Coded:
        k_codes, k_scale, v_codes, v_scale = segment.rows
        return Coded(
            bits=8,
            k=Codes(codes=k_codes, scale=k_scale),
            v=Codes(codes=v_codes, scale=v_scale),
            share="entry",
            lengths=segment.lengths,
            start=segment.start,
            positions=segment.positions,
        )


def _decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    q = Quantized(codes=codes, scale=scale, zero=None, bits=8, axis="token", group=codes.shape[-1])
    return dequantize(q, dtype)
