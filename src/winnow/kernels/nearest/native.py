"""Similarity search in C++ (csrc/nearest.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.kernels.operands import DTYPES

__all__ = ["nearest", "unsupported"]


def unsupported(x_CD: Tensor) -> str:
    """Why the native kernel cannot take this matrix; empty where it can."""
    if x_CD.dtype not in DTYPES:
        return f"the matrix is {x_CD.dtype}; it takes float32 and bfloat16"
    if x_CD.shape[1] % 16:
        return f"the rows have {x_CD.shape[1]} elements; it takes multiples of 16"
    if x_CD.stride(1) != 1:
        return "the last dimension is not contiguous"
    return ""


def nearest(x_CD: Tensor, rows: Tensor, hosts: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`winnow.kernels.nearest.nearest`, whose checks the operands passed."""
    rows, hosts = rows.contiguous(), hosts.contiguous()
    cosine, host = torch.empty(rows.numel()), torch.empty(rows.numel(), dtype=torch.long)
    native = extension()
    assert native is not None
    native.nearest(
        DTYPES[x_CD.dtype],
        x_CD.data_ptr(),
        x_CD.stride(0),
        x_CD.shape[1],
        rows.data_ptr(),
        rows.numel(),
        hosts.data_ptr(),
        hosts.numel(),
        cosine.data_ptr(),
        host.data_ptr(),
    )
    return cosine, host
