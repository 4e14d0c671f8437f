"""Between entry numbers and positions, for selectors whose choice travels over layers or segments."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.types import Segment, Selection

__all__ = ["NOWHERE", "compact", "locate", "positions_of"]

NOWHERE = torch.iinfo(torch.int32).max
"""Stands for no position; greater than any."""


def compact(entries_HN: Tensor, valid_HN: Tensor) -> Selection:
    """The valid entry numbers of every row, ascending, as a selection.

    Parameters
    ----------
    entries_HN : Tensor
        ``[H, N]`` integer entry numbers, unique among the valid ones of a row.
    valid_HN : Tensor
        ``[H, N]`` bool.
    """
    counts_H = valid_HN.sum(1)
    ordered_HN = torch.where(valid_HN, entries_HN.int(), NOWHERE).sort(1).values
    longest = int(counts_H.max()) if counts_H.numel() else 0
    # Behind a row's count stands entry 0: in range for whoever looks, read by nobody.
    listed_HN = ordered_HN[:, :longest]
    return Selection(indices=listed_HN.masked_fill(listed_HN == NOWHERE, 0), counts=counts_H.int())


def positions_of(segment: Segment, selection: Selection) -> Tensor:
    """``[H, N]`` int32 positions of selected entries, ``NOWHERE`` behind a row's count."""
    listed_HN = selection.indices.long()
    if segment.positions is None:
        found_HN = (listed_HN + segment.start).int()
    else:
        found_HN = segment.positions.gather(1, listed_HN)
    column_N = torch.arange(listed_HN.shape[1], device=listed_HN.device)
    return found_HN.masked_fill(column_N[None] >= selection.counts[:, None], NOWHERE)


def locate(segment: Segment, wanted_HN: Tensor) -> Selection:
    """The entries of a segment that lie at the wanted positions.

    Parameters
    ----------
    segment : Segment
    wanted_HN : Tensor
        ``[H, N]`` int32 positions, unique and ascending in a row; ``NOWHERE`` fills the end.
        Positions that a head does not hold are left out.
    """
    lengths_H = segment.lengths.to(wanted_HN.device)
    if segment.positions is None:
        entry_HN = wanted_HN - segment.start
        return compact(entry_HN, (entry_HN >= 0) & (entry_HN < lengths_H[:, None]))
    longest = int(segment.lengths.max())
    held_HS = segment.positions[:, :longest]
    if int(segment.lengths.min()) < longest:
        # Memory behind a shorter head is not valid; NOWHERE keeps its row ascending.
        column_S = torch.arange(longest, device=held_HS.device)
        held_HS = held_HS.masked_fill(column_S[None] >= lengths_H[:, None], NOWHERE)
    if longest == 0:
        return compact(wanted_HN, torch.zeros_like(wanted_HN, dtype=torch.bool))
    entry_HN = torch.searchsorted(held_HS.contiguous(), wanted_HN.contiguous())
    hit_HN = held_HS.gather(1, entry_HN.clamp(max=longest - 1)) == wanted_HN
    return compact(entry_HN, hit_HN & (wanted_HN != NOWHERE))
