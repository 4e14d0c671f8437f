"""Numbers that a scorer keeps for every entry, and that follow the entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Tracks"]


class Tracks:
    """One number per entry, head and layer, for entries in ascending position.

    Parameters
    ----------
    dtype : torch.dtype
    fill : float
        Value of an entry that nothing was written for yet.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> None:
        self._dtype = dtype
        self._fill = fill
        self._tables: dict[int, Tensor] = {}
        self._lengths: dict[int, list[int]] = {}

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
        held, longest = lengths.tolist(), int(lengths.max())
        table = self._tables.get(layer)
        if table is None or table.shape[1] < longest:
            wider = torch.full((len(held), longest + longest // 4 + 64), self._fill, dtype=self._dtype)
            if table is not None:
                wider[:, : table.shape[1]] = table
            self._tables[layer] = table = wider
        before = self._lengths.get(layer, [0] * len(held))
        assert all(a <= b for a, b in zip(before, held, strict=True)), (
            "entries went without the tracks being told"
        )
        if new is not None:
            if len(set(before)) == len(set(held)) == 1:  # heads of one length together
                table[:, before[0] : held[0]] = new
            else:
                for row, a, b in zip(table, before, held, strict=True):
                    row[a:b] = new
        self._lengths[layer] = held
        return table[:, :longest]

    def keep(self, layer: int, keep: Sequence[Tensor]) -> None:
        """Entries ``keep[h]`` (ascending) of every head stayed; the others went."""
        table = self._tables.get(layer)
        if table is None:
            return
        lengths = self._lengths[layer]
        for h, kept in enumerate(keep):
            # Entries that came after the last look have no number yet: they keep the fill.
            known = kept[kept < lengths[h]]
            n = known.numel()
            if n < lengths[h]:
                table[h, :n] = table[h, known]
                table[h, n : lengths[h]] = self._fill
            lengths[h] = n
