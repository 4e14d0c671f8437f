"""Norm, rotation and gated activation in C++ (csrc/pointwise.cpp). Called for every layer and token."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.kernels.operands import DTYPES

__all__ = ["add_rms_norm", "rotate_heads", "silu_mul", "unsupported"]


def unsupported(operands: tuple[Tensor, ...]) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    dtype = operands[0].dtype
    if dtype not in DTYPES:
        return f"operands are {dtype}, not float32 or bfloat16"
    for operand in operands:
        if operand.dtype != dtype or not operand.is_contiguous():
            return "operands differ in dtype or are not contiguous"
    return ""


def add_rms_norm(x_RK: Tensor, delta_RK: Tensor | None, weight_K: Tensor, eps: float) -> Tensor:
    rows, width = x_RK.shape
    out_RK = torch.empty_like(x_RK)
    native = extension()
    assert native is not None
    native.norm(
        DTYPES[x_RK.dtype],
        x_RK.data_ptr(),
        0 if delta_RK is None else delta_RK.data_ptr(),
        weight_K.data_ptr(),
        out_RK.data_ptr(),
        rows,
        width,
        eps,
    )
    return out_RK


def rotate_heads(
    heads_RHD: Tensor,
    cos_RE: Tensor,
    sin_RE: Tensor,
    query_heads: int,
    key_heads: int,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
) -> None:
    rows, all_heads, depth = heads_RHD.shape
    cos_RE, sin_RE = cos_RE.float().contiguous(), sin_RE.float().contiguous()
    native = extension()
    assert native is not None
    native.rotate(
        DTYPES[heads_RHD.dtype],
        heads_RHD.data_ptr(),
        cos_RE.data_ptr(),
        sin_RE.data_ptr(),
        0 if q_weight_D is None else q_weight_D.data_ptr(),
        0 if k_weight_D is None else k_weight_D.data_ptr(),
        rows,
        all_heads * depth,
        query_heads,
        key_heads,
        depth,
        eps,
    )


def silu_mul(gate_up_RI: Tensor) -> Tensor:
    rows, both = gate_up_RI.shape
    out_RI = torch.empty(rows, both // 2, dtype=gate_up_RI.dtype)
    native = extension()
    assert native is not None
    native.silu(DTYPES[gate_up_RI.dtype], gate_up_RI.data_ptr(), out_RI.data_ptr(), rows, both // 2)
    return out_RI
