"""Rotation by position as two small tables, whatever turns the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.types import Rotary

__all__ = ["Turning", "turning"]

_PAGE = 64  # positions between two rows of the coarse table


@dataclass(frozen=True, kw_only=True)
class Turning:
    """A rotation of pairs of channels, for a stretch of positions.

    Turned by position ``p``, channel ``d`` of ``x`` is ``x[d] * cosine + x[partner[d]] * sine``. The angle is
    the sum of those of ``p // 64 * 64``, in the coarse table, and of ``p % 64``, in the fine one.

    Attributes
    ----------
    coarse, fine : Tensor
        ``[rows, 2, D]`` and ``[64, 2, D]`` float32: cosines and signed sines.
    start : int
        Row 0 of the coarse table is for position ``64 * start``.
    partner : Tensor or None
        ``[D]`` int32; a channel that does not turn is its own. None where nothing turns.
    """

    coarse: Tensor
    fine: Tensor
    start: int
    partner: Tensor | None


def turning(rotary: Rotary | None, width: int, first: int, last: int) -> Turning | None:
    """The tables of a rotation of ``width`` channels for positions ``first .. last - 1``.

    None if it turns anything but pairs of channels: turning unit vectors by one position shows which.
    """
    start, end = first // _PAGE, -(-last // _PAGE)
    if rotary is None:
        return Turning(coarse=torch.empty(0), fine=torch.empty(0), start=start, partner=None)
    by_one = rotary.turn(torch.eye(width), torch.ones(width, dtype=torch.int64))
    across = by_one - by_one.diag().diag()
    met = across.abs().max(1)
    own = torch.arange(width)
    partner = torch.where(met.values > 0, met.indices, own)
    pairs = (across != 0).sum(1).le(1).all() and torch.equal(partner[partner], own)
    if not pairs or not torch.equal(across, -across.T):
        return None
    # Of every pair one channel is turned from 1: it shows the cosine, its partner the sine.
    shown = own < partner
    turns = partner != own

    def table(positions_n: Tensor) -> Tensor:
        seen = rotary.turn(shown.float().expand(len(positions_n), -1).clone(), positions_n)
        other = seen[:, partner]
        cosine = torch.where(turns, torch.where(shown, seen, other), 1.0)
        sine = torch.where(turns, torch.where(shown, -other, seen), 0.0)
        return torch.stack([cosine, sine], 1)

    return Turning(
        coarse=table(torch.arange(start, end) * _PAGE),
        fine=table(torch.arange(_PAGE)),
        start=start,
        partner=partner.int(),
    )
