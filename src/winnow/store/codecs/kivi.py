"""What the codecs of few bits share: keys by channel, values by token.

The form of KIVI (arXiv 2402.02750): the outliers of keys keep to a few channels, so the entries of a
page share a scale per channel; values have no such channels, so neighbouring channels of one token
share one. Deviations: a page is 64 tokens (KIVI: 32), and it is encoded when a plan demotes it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from winnow.kernels.coded_decode import Coded, Codes
from winnow.kernels.quantize import Quantized, dequantize, quantize
from winnow.store.codecs.coded import ReadAsCodes
from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.protocol import ENTRIES, Plane

__all__ = ["Kivi"]

_GROUP = 32


class Kivi(ReadAsCodes):
    """K in ``bits`` per channel and page, V in ``bits`` per token and group of channels."""

    bits: Literal[2, 4]
    name: str

    @staticmethod
    def of(bits: Literal[2, 4]) -> Kivi:
        """The form at so many bits, for codecs that add to it."""
        plain = Kivi()
        plain.bits, plain.name = bits, f"int{bits}"
        return plain

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        if head_dim * self.bits % 8:
            raise ValueError(
                f"codec {self.name!r}: {head_dim} values of {self.bits} bits do not fill bytes; use 'int8'"
            )
        width, groups = head_dim * self.bits // 8, head_dim // _group(head_dim)
        return (
            Plane(name="k_codes", dtype=torch.uint8, width=width),
            Plane(name="k_scale", dtype=torch.bfloat16, width=head_dim, entries=ENTRIES),
            Plane(name="k_zero", dtype=torch.bfloat16, width=head_dim, entries=ENTRIES),
            Plane(name="v_codes", dtype=torch.uint8, width=width),
            Plane(name="v_scale", dtype=torch.bfloat16, width=groups),
            Plane(name="v_zero", dtype=torch.bfloat16, width=groups),
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        of_k = quantize(k, bits=self.bits, axis="channel", group=ENTRIES)
        of_v = quantize(v, bits=self.bits, axis="token", group=_group(v.shape[-1]))
        assert of_k.zero is not None
        assert of_v.zero is not None
        return of_k.codes, of_k.scale, of_k.zero, of_v.codes, of_v.scale, of_v.zero

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = rows
        k = Quantized(
            codes=k_codes, scale=k_scale, zero=k_zero, bits=self.bits, axis="channel", group=ENTRIES
        )
        v = Quantized(
            codes=v_codes,
            scale=v_scale,
            zero=v_zero,
            bits=self.bits,
            axis="token",
            group=v_codes.shape[-1] * 8 // self.bits // v_scale.shape[-1],
        )
        return dequantize(k, dtype), dequantize(v, dtype)

    def coded(self, segment: EncodedSegment) -> Coded:
        k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = segment.rows[:6]
        return Coded(
            bits=self.bits,
            k=Codes(codes=k_codes, scale=k_scale, zero=k_zero),
            v=Codes(codes=v_codes, scale=v_scale, zero=v_zero),
            share="page",
            lengths=segment.lengths,
            start=segment.start,
            positions=segment.positions,
        )


def _group(head_dim: int) -> int:
    """The largest group of at most 32 channels that divides ``D``."""
    return next(size for size in range(min(_GROUP, head_dim), 0, -1) if head_dim % size == 0)
