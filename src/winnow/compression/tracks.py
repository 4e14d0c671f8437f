"""Numbers that a scorer keeps for every entry, and that follow the entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tracks", "growth", "reserve"]

_ROOM = 1024  # entries by which tables grow, so that a step copies nothing


@dataclass
class Tracks:
    """One number per entry, head and layer, for entries in ascending position.

    Attributes
    ----------
    dtype : torch.dtype
    fill : float
        Value of an entry that nothing was written for yet.
    tables : dict of int to Tensor
        ``[H, S]`` of each layer, with a reserve.
    lengths : dict of int to list of int
        Entries of each head that the tables knew of at the last look.
    """

    dtype: torch.dtype = torch.float32
    fill: float = 0.0
    tables: dict[int, Tensor] = field(default_factory=dict)
    lengths: dict[int, list[int]] = field(default_factory=dict)

    def of(self, layer: int, lengths: Tensor, *, new: float | None = None) -> Tensor:
        """The numbers of a layer whose heads hold ``lengths`` (``[H]``) entries now.

        Parameters
        ----------
        layer : int
        lengths : Tensor
        new : float, optional
            Value that entries get which came since the last call; ``fill`` by default.

        Returns
        -------
        Tensor
            ``[H, S]`` to read and to write in place, ``S`` the longest head. What lies behind the end of
            a shorter head has ``fill``.
        """
        held = lengths.tolist()
        longest = max(held)
        table = self.reserve(layer, len(held), longest)
        before = self.lengths.get(layer, [0] * len(held))
        assert all(a <= b for a, b in zip(before, held, strict=True)), (
            "entries went without the tracks being told"
        )
        if new is not None:
            if len(set(before)) == len(set(held)) == 1:  # heads of one length together
                table[:, before[0] : held[0]] = new
            else:
                for row, a, b in zip(table, before, held, strict=True):
                    row[a:b] = new
        self.lengths[layer] = held
        return table[:, :longest]

    def reserve(self, layer: int, heads: int, entries: int) -> Tensor:
        """The table of a layer, with room for so many entries of each head."""
        table = self.tables.get(layer)
        if table is None or table.shape[1] < entries:
            wider = torch.full((heads, _roomy(entries)), self.fill, dtype=self.dtype)
            if table is not None:
                wider[:, : table.shape[1]] = table
            self.tables[layer] = table = wider
        return table

    def keep(self, layer: int, keep: Sequence[Tensor]) -> None:
        """Entries ``keep[h]`` (ascending) of every head stayed; the others went."""
        table = self.tables.get(layer)
        if table is None:
            return
        lengths = self.lengths[layer]
        for h, kept in enumerate(keep):
            # Entries that came after the last look have no number yet: they keep the fill.
            known = kept[kept < lengths[h]]
            n = known.numel()
            if n < lengths[h]:
                table[h, :n] = table[h, known]
                table[h, n : lengths[h]] = self.fill
            lengths[h] = n


def growth(state: Any, entries: int) -> int:
    """Most bytes per layer and head that the tracks of a scorer's state take for ``entries`` more."""
    return sum(_roomy(entries) * tracks.dtype.itemsize for tracks in _within(state))


def reserve(state: Any, layer: int, lengths: Sequence[int]) -> None:
    """Make room for the entries that the heads of a layer hold.

    A scorer that looks while decoding would otherwise take the room for a whole prompt in one step.
    """
    for tracks in _within(state):
        tracks.reserve(layer, len(lengths), max(lengths))


def _roomy(entries: int) -> int:
    return -(-entries // _ROOM) * _ROOM


def _within(state: Any) -> list[Tracks]:
    if isinstance(state, Tracks):
        return [state]
    if not is_dataclass(state):
        return []
    return [tracks for one in fields(state) for tracks in _within(getattr(state, one.name))]
