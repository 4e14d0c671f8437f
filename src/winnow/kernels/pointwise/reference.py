"""Norm, rotation and gated activation in plain PyTorch: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["add_rms_norm", "rotate_heads", "silu_mul"]


def add_rms_norm(x_RK: Tensor, delta_RK: Tensor | None, weight_K: Tensor, eps: float) -> Tensor:
    if delta_RK is not None:
        x_RK += delta_RK
    return _rms_norm(x_RK, weight_K, eps).to(x_RK.dtype)


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
    ends = (0, query_heads, query_heads + key_heads)
    for first, last, weight_D in zip(ends[:-1], ends[1:], (q_weight_D, k_weight_D), strict=True):
        some_RHD = heads_RHD[:, first:last]
        # Rounded between norm and rotation, as models that do the two apart do.
        turned = some_RHD if weight_D is None else _rms_norm(some_RHD, weight_D, eps).to(some_RHD.dtype)
        a, b = turned.float().chunk(2, dim=-1)
        cos, sin = cos_RE[:, None], sin_RE[:, None]
        some_RHD.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))


def silu_mul(gate_up_RI: Tensor) -> Tensor:
    gate, up = gate_up_RI.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up_RI.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
