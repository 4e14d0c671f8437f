"""Few bits with little beside them: what is encoded together shares the scales of its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.coded_decode import Coded, Codes
from winnow.kernels.quantize import Quantized, dequantize, quantize
from winnow.store.codecs.coded import ReadAsCodes
from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.protocol import ENTRIES, Plane

__all__ = ["Separable"]


class Separable(ReadAsCodes):
    """K per channel over all entries that are encoded together, V channel-separable per token.

    The form of ZipCache (arXiv 2405.14256). With ``c_i = sqrt(max over tokens of abs(V_i))`` for
    channel ``i``, ``V / c`` is rounded with one scale and zero per token and multiplied by ``c`` again:
    channels of unlike size share a token's scale. ``c`` and the scales of K are stored once for all
    pages of a head that are encoded together, so that the longer the stretch, the less they weigh.

    Parameters
    ----------
    bits : {8, 4, 2}
    """

    def __init__(self, bits: int):
        if bits not in (8, 4, 2):
            raise ValueError(f"codec 'separable:{bits}' has no such form; give 8, 4 or 2 bits")
        self.bits = bits
        self.name = f"separable:{bits}"

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        if head_dim * self.bits % 8:
            raise ValueError(
                f"codec {self.name!r}: {head_dim} values of {self.bits} bits do not fill bytes; use 'int8'"
            )
        width = head_dim * self.bits // 8
        return (
            Plane(name="k_codes", dtype=torch.uint8, width=width),
            _once("k_scale", head_dim),
            _once("k_zero", head_dim),
            Plane(name="v_codes", dtype=torch.uint8, width=width),
            Plane(name="v_scale", dtype=torch.bfloat16, width=1),
            Plane(name="v_zero", dtype=torch.bfloat16, width=1),
            _once("v_channel", head_dim),
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        of_k = quantize(k, bits=self.bits, axis="channel", group=k.shape[0])
        # A channel that is zero throughout divides by one. c is rounded before it divides, as it is
        # what multiplies again.
        c = v.float().abs().amax(0, keepdim=True).sqrt().bfloat16()
        c = torch.where(c == 0, 1.0, c)
        of_v = quantize(v.float() / c.float(), bits=self.bits, axis="token", group=v.shape[1])
        assert of_k.zero is not None
        assert of_v.zero is not None
        return of_k.codes, of_k.scale, of_k.zero, of_v.codes, of_v.scale, of_v.zero, c.bfloat16()

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, c = rows
        bits, size = self.bits, c.shape[-1]
        k = Quantized(codes=k_codes, scale=k_scale, zero=k_zero, bits=bits, axis="channel", group=ENTRIES)
        v = Quantized(codes=v_codes, scale=v_scale, zero=v_zero, bits=bits, axis="token", group=size)
        value = dequantize(v, dtype)
        value.view(*c.shape[:-1], ENTRIES, size).mul_(c.to(dtype).unsqueeze(-2))
        return dequantize(k, dtype), value

    def coded(self, segment: EncodedSegment) -> Coded:
        k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, v_channel = segment.rows
        return Coded(
            bits=self.bits,
            k=Codes(codes=k_codes, scale=k_scale, zero=k_zero),
            v=Codes(codes=v_codes, scale=v_scale, zero=v_zero),
            share="batch",
            v_channel=v_channel,
            batches=segment.batches,
            lengths=segment.lengths,
            start=segment.start,
            positions=segment.positions,
        )


def _once(name: str, width: int) -> Plane:
    return Plane(name=name, dtype=torch.bfloat16, width=width, entries=ENTRIES, once=True)
