"""Matrix-vector product in C++ (csrc/matvec.cpp). Called several times per layer and token: keep it short."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.kernels.operands import DTYPES

from .weights import Int8Weight

__all__ = ["MAX_ROWS", "matvec", "unsupported"]

MAX_ROWS = 8
_MAX_INNER_INT8 = 1 << 16  # 255 * 127 * 65536 still fits the 32-bit sums


def unsupported(x_RK: Tensor, w_NK: Tensor | Int8Weight) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    if x_RK.dtype not in DTYPES:
        return f"x is {x_RK.dtype}, not float32 or bfloat16"
    if isinstance(w_NK, Int8Weight):
        codes = w_NK.codes
        if codes.shape[1] > _MAX_INNER_INT8:
            return f"8-bit rows longer than {_MAX_INNER_INT8}"
        if not (w_NK.scale.is_contiguous() and w_NK.row_sum.is_contiguous()):
            return "scale or row_sum is not contiguous"
    else:
        codes = w_NK
        if codes.dtype not in DTYPES:
            return f"weights are {codes.dtype}, not float32, bfloat16 or Int8Weight"
    if codes.device != x_RK.device:
        return f"weights lie on {codes.device}"
    # A dimension of one element may carry any stride.
    if x_RK.shape[1] > 1 and (x_RK.stride(1) != 1 or codes.stride(1) != 1):
        return "the last dimension is not contiguous"
    return ""


def matvec(x_RK: Tensor, w_NK: Tensor | Int8Weight) -> Tensor:
    rows, inner = x_RK.shape
    if isinstance(w_NK, Int8Weight):
        w, kind, scale, row_sum = w_NK.codes, 2, w_NK.scale.data_ptr(), w_NK.row_sum.data_ptr()
    else:
        w, kind, scale, row_sum = w_NK, DTYPES[w_NK.dtype], 0, 0
    outer = w.shape[0]
    out_RN = torch.empty(rows, outer, dtype=x_RK.dtype)
    native = extension()
    assert native is not None
    native.matvec(
        kind,
        DTYPES[x_RK.dtype],
        x_RK.data_ptr(),
        x_RK.stride(0),
        w.data_ptr(),
        w.stride(0),
        out_RN.data_ptr(),
        outer,
        rows,
        outer,
        inner,
        scale,
        row_sum,
    )
    return out_RN
