"""Top-k selection in C++ (csrc/top_k.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension

__all__ = ["top_k"]


def top_k(scores_RS: Tensor, lengths_R: Tensor, k_R: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """As :func:`winnow.kernels.top_k.top_k`, whose checks the operands passed."""
    rows, width = scores_RS.shape
    indices = torch.empty(rows, most, dtype=torch.int32)
    counts = torch.empty(rows, dtype=torch.int32)
    native = extension()
    assert native is not None
    native.top_k(
        scores_RS.data_ptr(),
        rows,
        scores_RS.stride(0),
        width,
        lengths_R.data_ptr(),
        k_R.data_ptr(),
        indices.data_ptr(),
        most,
        counts.data_ptr(),
    )
    return indices, counts
