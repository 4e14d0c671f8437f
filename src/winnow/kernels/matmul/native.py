"""Matrix products in C++ (csrc/matmul.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels import pointwise
from winnow.kernels.backend import extension
from winnow.kernels.matvec import MAX_ROWS, matvec
from winnow.kernels.operands import DTYPES

__all__ = ["gated_matmul", "is_faster", "matmul", "unsupported"]


def is_faster(rows: int) -> bool:
    """Whether the kernel beats PyTorch's products on this processor; `winnow bench kernels` measures both.

    For few rows it does everywhere. For more it does on AMD's Zen 4, in bfloat16 and float32; what has tiles
    for products (AMX) is left to PyTorch, and so is what has neither AVX-512 nor AVX2.
    """
    native = extension()
    if native is None or rows <= MAX_ROWS:
        return native is not None
    return native.current_isa() in ("avx512", "avx2") and not native.has_matrix_tiles()


def unsupported(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    if x_RK.dtype not in DTYPES:
        return f"x is {x_RK.dtype}, not float32 or bfloat16"
    if w_NK.device != x_RK.device or not (bias_N is None or bias_N.device == x_RK.device):
        return "weights or bias lie on another device"
    # A dimension of one element may carry any stride.
    if x_RK.shape[1] > 1 and (x_RK.stride(1) != 1 or w_NK.stride(1) != 1):
        return "the last dimension is not contiguous"
    if bias_N is not None and not bias_N.is_contiguous():
        return "the bias is not contiguous"
    if x_RK.shape[1] == 0:
        return "there is nothing to sum"
    return ""


def matmul(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if _are_few(x_RK):
        return _few(x_RK, w_NK, bias_N).to(x_RK.dtype)
    return _product(x_RK, w_NK, bias_N, gated=False)


def gated_matmul(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if _are_few(x_RK):
        return pointwise.silu_mul(_few(x_RK, w_NK, bias_N)).to(x_RK.dtype)
    return _product(x_RK, w_NK, bias_N, gated=True)


def _are_few(x_RK: Tensor) -> bool:
    """Whether to use the matrix-vector product: without AVX-512 the other packs all weights first."""
    native = extension()
    return len(x_RK) <= MAX_ROWS and native is not None and native.current_isa() != "avx512"


def _few(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """``[R, N]`` in float32."""
    out_RN = matvec(x_RK.float(), w_NK, backend="native")
    return out_RN if bias_N is None else out_RN.add_(bias_N)


def _product(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None, *, gated: bool) -> Tensor:
    (rows, inner), outer = x_RK.shape, w_NK.shape[0]
    wide = outer // 2 if gated else outer
    out_RN = torch.empty(rows, wide, dtype=x_RK.dtype)
    native = extension()
    assert native is not None
    if rows and wide:
        native.matmul(
            gated,
            DTYPES[x_RK.dtype],
            x_RK.data_ptr(),
            x_RK.stride(0),
            w_NK.data_ptr(),
            w_NK.stride(0),
            0 if bias_N is None else bias_N.data_ptr(),
            out_RN.data_ptr(),
            wide,
            rows,
            outer,
            inner,
        )
    return out_RN
