"""Queries of a prompt that a compression asked for, collected across the chunks of a prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.types import Needs

__all__ = ["QueryWatch"]


class QueryWatch:
    """The last ``window_queries`` queries, and ``random_queries`` others.

    Parameters
    ----------
    needs : Needs
    """

    def __init__(self, needs: Needs) -> None:
        self._window = needs.window_queries
        self._random = needs.random_queries
        self._drawn = torch.empty(0, dtype=torch.int32)
        self._active = False
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, first: int, last: int, *, active: bool) -> None:
        """A prefill of positions ``first .. last - 1`` begins; nobody will ask unless ``active``."""
        self._seen.clear()
        self._active = active and self._window + self._random > 0
        if self._active and self._random:
            others = max(0, last - first - self._window)
            drawn = torch.randperm(others, generator=torch.Generator().manual_seed(last))[: self._random]
            self._drawn = (drawn.sort().values + first).to(torch.int32)

    def see(self, layer: int, q_THD: Tensor, positions_T: Tensor) -> None:
        """Take what is asked for from the queries of one chunk."""
        if not self._active:
            return
        positions_T = positions_T.cpu()
        if layer in self._seen:
            q_before, before = self._seen[layer]
            q_THD, positions_T = torch.cat([q_before, q_THD]), torch.cat([before, positions_T])
        wanted_T = torch.isin(positions_T, self._drawn)
        if self._window:
            wanted_T[-self._window :] = True
        self._seen[layer] = (q_THD[wanted_T.to(q_THD.device)], positions_T[wanted_T])

    def take(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """``[W, H * G, D]`` queries and their ``[W]`` positions, ascending; forgets them."""
        return self._seen.pop(layer, None)

    def forget(self) -> None:
        """Drop everything (a prefill was interrupted)."""
        self._seen.clear()
