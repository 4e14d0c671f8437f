"""Accumulated attention: what was attended to so far matters most (heavy hitters)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow._check import integer
from winnow.compression.protocol import Plain
from winnow.compression.tracks import Tracks
from winnow.types import Glimpse, Needs, Observation, Scores

__all__ = ["Accumulated"]


@dataclass(frozen=True, kw_only=True)
class Accumulated(Plain):
    """H2O's score: attention probability summed over every query so far.

    Source: H2O (arXiv 2306.14048), ``h2o_hf/utils_real_drop/modify_llama.py``.

    ``S_j = sum over queries i of A[i, j]``, prefill and decode steps alike, summed over the query
    heads of a KV head. Earlier entries were seen by more queries: that bias is the method's own.

    Attributes
    ----------
    recent : int
        Last entries of every head that are protected.
    sinks : int
        First entries of the sequence that are protected.
    """

    recent: int = 512
    sinks: int = 0

    def __post_init__(self) -> None:
        integer("accumulated", "recent", self.recent, 0)
        integer("accumulated", "sinks", self.sinks, 0)

    @property
    def needs(self) -> Needs:
        """The attention mass of prefill and decode."""
        return Needs(mass="all")

    @property
    def protects(self) -> int:
        """Entries per head that are protected."""
        return self.recent + self.sinks

    def state(self) -> Tracks:
        """The sums of one sequence."""
        return Tracks()

    def watch(self, seen: Glimpse, state: Tracks) -> None:
        """Add what a call showed."""
        sums_HS = state.of(seen.layer, seen.lengths)
        sums_HS += seen.mass.cpu()

    def follow(self, layer: int, keep: Sequence[Tensor], state: Tracks) -> None:
        """The sums follow their entries."""
        state.keep(layer, keep)

    def score(self, seen: Observation, state: Tracks) -> Scores:
        """The sums as they stand."""
        lengths = seen.segment.lengths
        value_HS = state.of(seen.layer, lengths).clone()
        protected_HS = torch.zeros_like(value_HS, dtype=torch.bool)
        for h, n in enumerate(lengths.tolist()):
            value_HS[h, n:] = -torch.inf
            protected_HS[h, max(0, n - self.recent) : n] = True
            protected_HS[h, : min(n, self.sinks)] = True
        return Scores(value=value_HS, protected=protected_HS, lengths=lengths)
