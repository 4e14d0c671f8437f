"""Which entries a decode step attended to, and for how long they had not been: in one pass, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import Backend, choose

from . import native, reference

__all__ = ["recur"]


def recur(
    mass_HS: Tensor,
    active_HS: Tensor,
    pause_HS: Tensor,
    *,
    step: int,
    least: float,
    backend: Backend = "auto",
) -> None:
    """Note in ``active`` and ``pause`` the entries that a step gave at least ``least`` of its attention.

    Where ``mass >= least``, ``pause`` becomes ``max(pause, step - active)`` and then ``active`` ``step``.

    Parameters
    ----------
    mass_HS : Tensor
        ``[H, S]`` float32.
    active_HS, pause_HS : Tensor
        ``[H, S]`` int32, changed in place. Of all three the last dimension is contiguous.
    step : int
    least : float
    backend : Backend
        A GPU has no kernel of its own: it runs the reference.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices differ from that.
    """
    for name, x, dtype in (
        ("mass", mass_HS, torch.float32),
        ("active", active_HS, torch.int32),
        ("pause", pause_HS, torch.int32),
    ):
        if x.dtype != dtype or x.shape != mass_HS.shape or x.dim() != 2 or x.device != mass_HS.device:
            raise ValueError(
                f"recur takes {name} as {dtype} {tuple(mass_HS.shape)} on {mass_HS.device}, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}; convert it"
            )
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"recur: the last dimension of {name} must be contiguous; copy it")
    if backend == "auto" and mass_HS.device.type != "cpu":
        backend = "reference"
    chosen = choose("recur", backend, mass_HS.device)
    if chosen == "triton":
        raise ValueError("recur has no Triton kernel; use backend='auto'")
    run = native.recur if chosen == "native" else reference.recur
    run(mass_HS, active_HS, pause_HS, step, least)
