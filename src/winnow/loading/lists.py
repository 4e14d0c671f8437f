"""Lists of entries: chosen over all segments of a layer at once, and carried to other layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.top_k import top_k
from winnow.store.codecs import EncodedSegment
from winnow.types import Segment, Selection

__all__ = ["NOWHERE", "Carried", "choose", "compact", "identity", "locate", "positions_of"]

Stored = Segment | EncodedSegment

NOWHERE = torch.iinfo(torch.int32).max
"""Stands for no position; greater than any."""


def identity(segment: Stored) -> tuple[object, ...]:
    """What changes whenever side data that was made of a segment is stale; appended entries do not."""
    return (segment.version, segment.start, segment.codec, segment.heads)


def choose(
    scores_HS: Tensor, widths: Sequence[int], keep: int, *, backend: Backend = "auto"
) -> tuple[Selection, ...]:
    """The ``keep`` best entries of every head over all segments together, one selection per segment.

    Parameters
    ----------
    scores_HS : Tensor
        ``[H, sum of widths]`` float32, segment after segment; ``-inf`` and NaN are not chosen, and of
        equal scores the later entry is.
    widths : sequence of int
        Columns of each segment.
    """
    H, total = scores_HS.shape
    lengths_H = torch.full((H,), total, dtype=torch.int32)
    indices_HN, counts_H = top_k(scores_HS, lengths_H, min(keep, total), backend=backend)
    if len(widths) == 1:
        return (Selection(indices=indices_HN, counts=counts_H),)
    out, first = [], 0
    for width in widths:
        # Behind a row's count stands -1, which lies in no segment.
        out.append(compact(indices_HN - first, (indices_HN >= first) & (indices_HN < first + width)))
        first += width
    return tuple(out)


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


def positions_of(segment: Stored, selection: Selection) -> Tensor:
    """``[H, N]`` int32 positions of selected entries, ``NOWHERE`` behind a row's count."""
    listed_HN = selection.indices.long().clamp(min=0)
    if segment.positions is None:
        found_HN = (listed_HN + segment.start).int()
    else:
        found_HN = segment.positions.gather(1, listed_HN)
    column_N = torch.arange(listed_HN.shape[1], device=listed_HN.device)
    return found_HN.masked_fill(column_N[None] >= selection.counts[:, None], NOWHERE)


def locate(segment: Stored, wanted_HN: Tensor) -> Selection:
    """The entries of a segment that lie at the wanted positions.

    Parameters
    ----------
    segment : Segment or EncodedSegment
    wanted_HN : Tensor
        ``[H, N]`` int32 positions, unique and ascending in a row; ``NOWHERE`` fills the end.
        Positions that a head does not hold are left out.
    """
    lengths_H = segment.lengths.to(wanted_HN.device)
    if segment.positions is None:
        entry_HN = wanted_HN - segment.start
        return compact(entry_HN, (entry_HN >= 0) & (entry_HN < lengths_H[:, None]))
    longest = int(segment.lengths.max())
    if longest == 0:
        return compact(wanted_HN, torch.zeros_like(wanted_HN, dtype=torch.bool))
    held_HS = segment.positions[:, :longest]
    if int(segment.lengths.min()) < longest:
        # Memory behind a shorter head is not valid; NOWHERE keeps its row ascending.
        column_S = torch.arange(longest, device=held_HS.device)
        held_HS = held_HS.masked_fill(column_S[None] >= lengths_H[:, None], NOWHERE)
    entry_HN = torch.searchsorted(held_HS.contiguous(), wanted_HN.contiguous())
    hit_HN = held_HS.gather(1, entry_HN.clamp(max=longest - 1)) == wanted_HN
    return compact(entry_HN, hit_HN & (wanted_HN != NOWHERE))


@dataclass
class Carried:
    """A choice on its way through the layers of one step.

    What is carried are positions, not entry numbers: layers may hold different entries. Layers
    that hold the same ones, which is the rule without compression, share the lists as they are.
    """

    _layout: object | None = None
    _selections: tuple[Selection, ...] = ()
    _segments: tuple[Stored, ...] = ()
    _positions: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._selections)

    def clear(self) -> None:
        """Nothing is chosen yet in this step."""
        self._selections, self._segments, self._positions = (), (), None

    def put(self, segments: tuple[Stored, ...], selections: tuple[Selection, ...]) -> None:
        """Take a layer's choice, one selection per segment."""
        self._segments, self._selections, self._positions = segments, selections, None
        self._layout = _layout(segments)

    def read(self, segments: tuple[Stored, ...]) -> tuple[Selection, ...]:
        """The chosen positions as entries of another layer."""
        assert self, "nothing was chosen"
        if self._layout is not None and _layout(segments) == self._layout:
            return self._selections
        if self._positions is None:
            found = [positions_of(s, c) for s, c in zip(self._segments, self._selections, strict=True)]
            self._positions = torch.cat(found, 1).sort(1).values
        return tuple(locate(segment, self._positions) for segment in segments)


def _layout(segments: tuple[Stored, ...]) -> object | None:
    """What decides which position an entry number means; None where it differs by entry."""
    if any(segment.positions is not None for segment in segments):
        return None
    return tuple((segment.start, tuple(segment.lengths.tolist())) for segment in segments)
