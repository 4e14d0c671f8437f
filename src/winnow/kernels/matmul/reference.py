"""The products as PyTorch computes them: the oracle, and on a GPU the fastest."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from winnow.kernels.pointwise import silu_mul

__all__ = ["gated_matmul", "matmul"]


def matmul(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return functional.linear(x_RK, w_NK, bias_N)


def gated_matmul(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return silu_mul(functional.linear(x_RK, w_NK, bias_N))
