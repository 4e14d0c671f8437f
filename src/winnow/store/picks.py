"""Ascending lists of entry numbers, one per head, and the entries on their way from run to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Picks", "Piece", "between", "is_all", "lead", "others", "stretch"]

Picks = list[Tensor]
"""Per head ``[n]`` int64 entry numbers within a run, ascending and unique."""


def is_all(picked: Picks, lengths: Sequence[int]) -> bool:
    return all(len(pick) == n for pick, n in zip(picked, lengths, strict=True))


def others(pick: Tensor, n: int) -> Tensor:
    """The entries below ``n`` that are not picked."""
    if len(pick) == 0 or int(pick[-1]) == len(pick) - 1:
        return torch.arange(len(pick), n)
    stays = torch.ones(n, dtype=torch.bool)
    stays[pick] = False
    return stays.nonzero().flatten()


def lead(pick: Tensor) -> int:
    """How many of the oldest entries are picked without a gap."""
    if len(pick) == 0 or int(pick[-1]) == len(pick) - 1:
        return len(pick)
    return int((pick == torch.arange(len(pick))).long().cumprod(0).sum())


def stretch(picked: Picks) -> tuple[int, int] | None:
    """First entry and number of entries, where every head's picks are the same gapless stretch."""
    first, count = int(picked[0][0]) if len(picked[0]) else 0, len(picked[0])
    for head, pick in enumerate(picked):
        if head and pick is picked[head - 1]:
            continue
        if len(pick) != count or (count and (int(pick[0]), int(pick[-1])) != (first, first + count - 1)):
            return None
    return first, count


def between(kept: Tensor, first: int, last: int) -> Tensor:
    """The part of an ascending list that lies in ``first .. last - 1``, counted from ``first``."""
    a, b = torch.searchsorted(kept, torch.tensor([first, last])).tolist()
    return kept[a:b] - first if first else kept[a:b]


@dataclass(frozen=True)
class Piece:
    """Decoded entries of one head on their way from one run to another.

    Attributes
    ----------
    k, v : Tensor
        ``[n, D]``.
    positions : Tensor
        ``[n]`` int32.
    bias : Tensor or None
        ``[n]`` float32, where the run has any.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    bias: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Piece:
        """The same change of every tensor."""
        bias = None if self.bias is None else change(self.bias)
        return Piece(change(self.k), change(self.v), change(self.positions), bias)

    @staticmethod
    def merged(pieces: Sequence[Piece]) -> Piece:
        """All of them as one, in ascending position."""
        if len(pieces) == 1:
            return pieces[0]
        bias = None
        if any(p.bias is not None for p in pieces):
            plain = [p.positions.new_zeros(len(p.positions), dtype=torch.float32) for p in pieces]
            bias = torch.cat([z if p.bias is None else p.bias for p, z in zip(pieces, plain, strict=True)])
        whole = Piece(
            torch.cat([p.k for p in pieces]),
            torch.cat([p.v for p in pieces]),
            torch.cat([p.positions for p in pieces]),
            bias,
        )
        if bool((whole.positions.diff() > 0).all()):
            return whole
        order = whole.positions.argsort()
        return whole.map(lambda x: x[order.to(x.device)])
