"""Matrix-vector product in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from .weights import Int8Weight

__all__ = ["matvec", "quantize_rows"]


def quantize_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 8 bits: int8 codes ``[R, K]`` and float32 scales ``[R]``."""
    wide_RK = x_RK.float()
    top_R = wide_RK.abs().amax(1) if x_RK.shape[1] else wide_RK.new_zeros(x_RK.shape[0])
    # A row with NaN or infinity has no codes; its scale is NaN and makes its outputs NaN.
    wide_RK = torch.where(torch.isfinite(top_R)[:, None], wide_RK, 0.0)
    top_R = torch.where(torch.isfinite(top_R), top_R, torch.nan)
    # The factor is rounded to float32 before it multiplies, as the native kernel does it, so that
    # both round every element to the same code.
    factor_R = torch.where(top_R > 0, torch.full_like(top_R, 127.0).div(top_R), 0.0)
    return torch.round(wide_RK * factor_R[:, None]).to(torch.int8), top_R / 127


def matvec(x_RK: Tensor, w_NK: Tensor | Int8Weight) -> Tensor:
    if not isinstance(w_NK, Int8Weight):
        return (x_RK.float() @ w_NK.float().T).to(x_RK.dtype)
    codes_RK, scale_R = quantize_rows(x_RK)
    # float64 holds these integer sums exactly.
    total_RN = codes_RK.double() @ w_NK.codes.double().T
    return (total_RN.float() * (scale_R[:, None] * w_NK.scale[None])).to(x_RK.dtype)
