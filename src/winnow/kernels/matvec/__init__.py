"""A few rows times a large weight matrix, as in the linear layers of decode: bound by reading the weights."""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose

from . import native, reference
from .weights import Int8Weight, quantize_weight

__all__ = ["MAX_ROWS", "Int8Weight", "matvec", "quantize_weight"]

MAX_ROWS = native.MAX_ROWS
"""Rows that share one pass over the weights. Above it, ``winnow.kernels.matmul`` is the better call."""


def matvec(x_RK: Tensor, w_NK: Tensor | Int8Weight, *, backend: Backend = "auto") -> Tensor:
    """``x @ w.T`` for a few rows, as fast as the weights can be read.

    Parameters
    ----------
    x_RK : Tensor
        ``[R, K]`` float32 or bfloat16, the last dimension contiguous. Any ``R`` works; the native
        kernel reads the weights at most once per ``MAX_ROWS`` rows.
    w_NK : Tensor or Int8Weight
        ``[N, K]`` float32, bfloat16 or 8-bit, the last dimension contiguous. With 8-bit weights each
        row of ``x`` is rounded to 8 bits too, by its own largest magnitude, and the products are
        exact integers. That rounding, up to 1/254 of the row's largest magnitude per element, is
        part of the result.
    backend : Backend

    Returns
    -------
    Tensor
        ``[R, N]`` in the dtype of ``x``, summed in float32 (8-bit weights: in int32).

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the demanded backend cannot run.
    """
    wide = w_NK.codes if isinstance(w_NK, Int8Weight) else w_NK
    if x_RK.dim() != 2 or wide.dim() != 2 or x_RK.shape[1] != wide.shape[1]:
        raise ValueError(
            f"matvec takes x [R, K] and w [N, K], got {list(x_RK.shape)} and {list(wide.shape)}; "
            "reshape them to two dimensions with the same K"
        )
    chosen = choose("matvec", backend, x_RK.device, unsupported=native.unsupported(x_RK, w_NK))
    if chosen == "native":
        return native.matvec(x_RK, w_NK)
    if chosen == "triton":
        from . import triton

        return triton.matvec(x_RK, w_NK)
    return reference.matvec(x_RK, w_NK)
