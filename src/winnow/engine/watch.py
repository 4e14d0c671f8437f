"""Queries that a compression asked for: of a prompt, across its chunks, and the latest while decoding."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from winnow.types import Needs

__all__ = ["QueryWatch"]


class QueryWatch:
    """The last ``window_queries`` queries of a prompt, and ``random_queries`` others; or the latest.

    Parameters
    ----------
    needs : Needs
    decoding : bool
        Somebody asks while decoding too: the latest ``window_queries`` queries since the last :meth:`take`.
    """

    def __init__(self, needs: Needs, *, decoding: bool = False) -> None:
        self._decoding = decoding and needs.window_queries > 0
        self._latest: dict[int, deque[tuple[Tensor, Tensor]]] = {}
        self._window = needs.window_queries
        self._random = needs.random_queries
        self._drawn = torch.empty(0, dtype=torch.int32)
        self._active = False
        self._every = False
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, first: int, last: int, *, active: bool) -> None:
        """A prefill of positions ``first .. last - 1`` begins; nobody will ask unless ``active``."""
        self.forget()
        self._every = False
        self._active = active and self._window + self._random > 0
        if self._active and self._random:
            others = max(0, last - first - self._window)
            drawn = torch.randperm(others, generator=torch.Generator().manual_seed(last))[: self._random]
            self._drawn = (drawn.sort().values + first).to(torch.int32)

    def begin_probe(self) -> None:
        """What comes next is a probe: all of its queries are asked for, and none before it."""
        self.forget()
        self._active, self._every = True, True

    def since(self, end: int) -> int:
        """First position of a prompt that ends before ``end`` whose query somebody may ask for."""
        if not self._active:
            return end
        return 0 if self._every or self._random else max(0, end - self._window)

    def see(self, layer: int, q_THD: Tensor, positions_T: Tensor) -> None:
        """Take what is asked for from the queries of one chunk."""
        if not self._active:
            return
        positions_T = positions_T.cpu()
        if layer in self._seen:
            q_before, before = self._seen[layer]
            q_THD, positions_T = torch.cat([q_before, q_THD]), torch.cat([before, positions_T])
        wanted_T = torch.isin(positions_T, self._drawn)
        if self._every:
            wanted_T[:] = True
        elif self._window:
            wanted_T[-self._window :] = True
        self._seen[layer] = (q_THD[wanted_T.to(q_THD.device)], positions_T[wanted_T])

    def step(self, layer: int, q_1HD: Tensor, position_1: Tensor) -> None:
        """Take the query of a decode step."""
        if self._decoding:
            latest = self._latest.setdefault(layer, deque(maxlen=self._window))
            latest.append((q_1HD.clone(), position_1.cpu()))

    def take(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """``[W, H * G, D]`` queries and their ``[W]`` positions, ascending; forgets them."""
        latest = self._latest.pop(layer, None)
        if latest:
            queries, positions = zip(*latest, strict=True)
            return torch.cat(queries), torch.cat(positions)
        return self._seen.pop(layer, None)

    def forget(self) -> None:
        """Drop everything (a prefill was interrupted)."""
        self._seen.clear()
        self._latest.clear()
