"""Attention mass in C++ (csrc/mass.cpp): operands are checked here and handed over by address."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.kernels.operands import queries_and_entries, unsupported
from winnow.types import AttentionSpec, Segment

__all__ = ["mass", "unsupported"]


def mass(
    q_THD: Tensor, segment: Segment, spec: AttentionSpec, query_positions: Tensor, lse_TH: Tensor
) -> Tensor:
    """As :func:`winnow.kernels.mass.mass`; the operands passed :func:`unsupported`.

    Raises
    ------
    ValueError
        If a shape or type contradicts another.
    """
    T, heads, _ = q_THD.shape
    operands = queries_and_entries(q_THD, segment, spec, query_positions)
    if lse_TH.shape != (T, heads) or lse_TH.dtype != torch.float32 or lse_TH.device.type != "cpu":
        raise ValueError(
            f"lse is {lse_TH.dtype} {tuple(lse_TH.shape)} on {lse_TH.device}; "
            f"give float32 {(T, heads)} on cpu"
        )
    mass_HS = torch.empty(heads, int(segment.lengths.max()))
    native = extension()
    assert native is not None
    native.mass(
        **operands.arguments,
        lse=lse_TH.data_ptr(),
        lse_token=lse_TH.stride(0),
        lse_head=lse_TH.stride(1),
        mass=mass_HS.data_ptr(),
        width=mass_HS.shape[1],
    )
    return mass_HS
