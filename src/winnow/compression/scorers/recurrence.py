"""Recurrence: entries whose attention comes back are worth their longest pause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow._check import integer
from winnow.compression.protocol import Plain
from winnow.compression.tracks import Tracks
from winnow.kernels.recurrence import recur
from winnow.types import Glimpse, Needs, Observation, Scores

__all__ = ["Recurrence"]


@dataclass
class RecurrenceState:
    """Per entry the step of its last activation, and its longest pause between two; in tokens."""

    active: Tracks = field(default_factory=lambda: Tracks(torch.int32, -1))
    pause: Tracks = field(default_factory=lambda: Tracks(torch.int32, 0))


@dataclass(frozen=True, kw_only=True)
class Recurrence(Plain):
    """LazyEviction's score of maximum recurrence interval.

    Source: LazyEviction (arXiv 2506.15969), ``model/temp_cacheobs.py`` of its code.

    An entry is *active* in a decode step that gives it at least ``alpha`` of its attention (mean over
    the query heads of a KV head). With ``TS`` the last active step and ``MRI`` the longest pause
    between two active steps, at step ``t``::

        I = 2 sigmoid(-1 - (t - TS) / (MRI + 1e-5)) + [MRI > 0] 2 sigmoid(1 - MRI)

    An entry enters with ``TS`` one step before its own and ``MRI`` 0; the prompt with ``TS`` at its end.

    Attributes
    ----------
    alpha : float
        Attention from which an entry is active.
    recent : int
        Last entries of every head that are protected (``W``).
    """

    alpha: float = 5e-4
    recent: int = 128

    def __post_init__(self) -> None:
        integer("recurrence", "recent", self.recent, 0)
        if not self.alpha >= 0:
            raise ValueError(f"recurrence: alpha={self.alpha} will not do; give a probability, such as 5e-4")

    @property
    def needs(self) -> Needs:
        """The attention of every decode step."""
        return Needs(mass="decode")

    @property
    def protects(self) -> int:
        """Entries per head that are protected."""
        return self.recent

    def state(self) -> RecurrenceState:
        """No step was seen."""
        return RecurrenceState()

    def watch(self, seen: Glimpse, state: RecurrenceState) -> None:
        """Note which entries were active in a decode step."""
        t = int(seen.positions[-1])
        # Nobody looked at new entries yet: they are the prompt's, or the one that this step appended.
        active_HS = state.active.of(seen.layer, seen.lengths, new=t - 1)
        pause_HS = state.pause.of(seen.layer, seen.lengths)
        recur(seen.mass.cpu(), active_HS, pause_HS, step=t, least=self.alpha * seen.group)

    def follow(self, layer: int, keep: Sequence[Tensor], state: RecurrenceState) -> None:
        """Both numbers follow their entries."""
        state.active.keep(layer, keep)
        state.pause.keep(layer, keep)

    def score(self, seen: Observation, state: RecurrenceState) -> Scores:
        """Importance at the present step."""
        lengths = seen.segment.lengths
        t = seen.tokens - 1
        since_HS = t - state.active.of(seen.layer, lengths, new=t - 1).float()
        pause_HS = state.pause.of(seen.layer, lengths).float()
        value_HS = 2 * torch.sigmoid(-1 - since_HS / (pause_HS + 1e-5))
        value_HS += torch.where(pause_HS > 0, 2 * torch.sigmoid(1 - pause_HS), 0.0)
        protected_HS = torch.zeros_like(value_HS, dtype=torch.bool)
        for h, n in enumerate(lengths.tolist()):
            value_HS[h, n:] = -torch.inf
            protected_HS[h, max(0, n - self.recent) : n] = True
        return Scores(value=value_HS, protected=protected_HS, lengths=lengths)
