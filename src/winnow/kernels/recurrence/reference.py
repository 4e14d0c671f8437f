"""Recurrence in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["recur"]


def recur(mass_HS: Tensor, active_HS: Tensor, pause_HS: Tensor, step: int, least: float) -> None:
    now_HS = mass_HS >= least
    torch.maximum(pause_HS, (step - active_HS).mul_(now_HS), out=pause_HS)
    active_HS.masked_fill_(now_HS, step)
