"""Rows with most elements left out: the ones that stay, and a bit for each that says so."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expand", "pack"]


def pack(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Keep the ``kept`` elements of the largest magnitude of every row; of equal ones, the earlier.

    Parameters
    ----------
    x : Tensor
        ``[..., D]``, ``D`` a multiple of 8.
    kept : int
        From 1 to ``D``.

    Returns
    -------
    values : Tensor
        ``[..., kept]`` in the order of the channels.
    mask : Tensor
        ``[..., D / 8]`` uint8.
    """
    size = x.shape[-1]
    assert size % 8 == 0, "bits fill bytes"
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    at = order.sort(-1).values
    bits = torch.zeros(x.shape, dtype=torch.uint8, device=x.device).scatter_(-1, at, 1)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    mask = (bits.view(*x.shape[:-1], size // 8, 8) * weights).sum(-1, dtype=torch.uint8)
    return x.gather(-1, at), mask


def expand(values: Tensor, mask: Tensor) -> Tensor:
    """``[..., D]``: the values where the bits are set, zero elsewhere."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts & 1).flatten(-2).bool()
    # The number of bits before an element is the place of its value.
    place = bits.long().cumsum(-1).sub_(1).clamp_(min=0, max=values.shape[-1] - 1)
    return torch.where(bits, values.gather(-1, place), values.new_zeros(()))
