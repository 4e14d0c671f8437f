"""The newest entries matter most; no attention is looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from winnow._check import integer
from winnow.compression.protocol import Plain
from winnow.types import Observation, Scores

__all__ = ["Recency"]


@dataclass(frozen=True, kw_only=True)
class Recency(Plain):
    """Score every entry by its position and protect the first ``sinks``.

    The scorer of recipes that decide without looking: a codec on everything but the recent
    entries, or a cache of sinks and a sliding window.

    Attributes
    ----------
    sinks : int
        First entries of every head that are protected.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        integer("recency", "sinks", self.sinks, 0)

    @property
    def protects(self) -> int:
        """Entries per head that are protected."""
        return self.sinks

    def score(self, seen: Observation, state: None) -> Scores:
        """Score the entries of one layer."""
        segment = seen.segment
        H, S = segment.heads, int(segment.lengths.max()) if segment.heads else 0
        value_HS = torch.full((H, S), -torch.inf, device=segment.k.device)
        protected_HS = torch.zeros(H, S, dtype=torch.bool, device=segment.k.device)
        for h in range(H):
            n = int(segment.lengths[h])
            value_HS[h, :n] = segment.positions_of(h).float()
            protected_HS[h, : min(n, self.sinks)] = True
        return Scores(value=value_HS, protected=protected_HS, lengths=segment.lengths)
