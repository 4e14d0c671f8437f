"""Weights in 8 bits, one scale per output row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Int8Weight", "quantize_weight"]


@dataclass(frozen=True)
class Int8Weight:
    """A weight matrix in 8 bits: ``w[n, k]`` is about ``codes[n, k] * scale[n]``.

    Attributes
    ----------
    codes : Tensor
        ``[N, K]`` int8, from -127 to 127.
    scale : Tensor
        ``[N]`` float32.
    row_sum : Tensor
        ``[N]`` int32 sums of the codes of each row, which the native kernel needs because its
        instruction multiplies unsigned by signed.
    """

    codes: Tensor
    scale: Tensor
    row_sum: Tensor

    @property
    def bytes(self) -> int:
        """Bytes held, scales and sums included."""
        return self.codes.numel() + 4 * (self.scale.numel() + self.row_sum.numel())


def quantize_weight(w_NK: Tensor) -> Int8Weight:
    """Round a weight matrix ``[N, K]`` (any floating dtype) to 8 bits, symmetrically, per row.

    Raises
    ------
    ValueError
        If the weights are not a matrix, or hold NaN or infinity.
    """
    if w_NK.dim() != 2 or not w_NK.is_floating_point():
        raise ValueError(
            f"quantize_weight takes a floating [N, K] matrix, got {w_NK.dtype} {list(w_NK.shape)}"
        )
    wide_NK = w_NK.float()
    scale_N = wide_NK.abs().amax(1) / 127 if w_NK.shape[1] else wide_NK.new_zeros(w_NK.shape[0])
    if not bool(torch.isfinite(scale_N).all()):
        raise ValueError("weights hold NaN or infinity; repair the checkpoint before quantising it")
    # A row of zeros has scale zero; its codes are zero whatever it is divided by.
    divisor_N = torch.where(scale_N > 0, scale_N, 1.0)
    codes_NK = torch.round(wide_NK / divisor_N[:, None]).clamp_(-127, 127).to(torch.int8)
    return Int8Weight(codes_NK, scale_N, codes_NK.sum(1, dtype=torch.int32))
