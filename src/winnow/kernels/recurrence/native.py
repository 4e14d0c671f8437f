"""Recurrence in C++ (csrc/recurrence.cpp)."""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import extension

__all__ = ["recur"]


def recur(mass_HS: Tensor, active_HS: Tensor, pause_HS: Tensor, step: int, least: float) -> None:
    """As :func:`winnow.kernels.recurrence.recur`, whose checks the operands passed."""
    native = extension()
    assert native is not None
    native.recur(
        mass_HS.data_ptr(),
        mass_HS.stride(0),
        active_HS.data_ptr(),
        active_HS.stride(0),
        pause_HS.data_ptr(),
        pause_HS.stride(0),
        *mass_HS.shape,
        least,
        step,
    )
