"""Every entry keeps as many bits as its score earns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from winnow._check import integer
from winnow.compression.actions.drop import kept
from winnow.compression.protocol import Plain, Stored
from winnow.store.codecs import ENTRIES, codec_named
from winnow.types import Budget, Demotion, Observation, Plan, Scores

__all__ = ["Grade", "Graded"]


@dataclass
class Graded:
    """What was graded of one sequence, by layer and head.

    Attributes
    ----------
    end : dict of int to list of int
        Position below which every entry has had its grade.
    low, all : dict of int to list of int
        Entries that got the lower grade, and that got any; after a rollback, those that are left of them.
    """

    end: dict[int, list[int]] = field(default_factory=dict)
    low: dict[int, list[int]] = field(default_factory=dict)
    all: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Grade(Plain):
    """Drop what does not fit the budget, then encode what is new by its score, in two codecs.

    Of the entries that have no grade yet, all but the newest ``recent`` are graded, in whole pages of
    the store: in every head the lowest scores go to ``low``, the others to ``high``, so that of all
    entries graded so far ``percent`` are low, to half a page. Of equal scores, the later is high.
    A grade is for good: nothing is encoded twice. What fills no page waits for the next time.

    Source: ZipCache (arXiv 2405.14256), ``zipcache/models/modeling_llama.py``.

    Attributes
    ----------
    high, low : str
        Codecs of the two grades (see ``winnow.store.codecs``).
    percent : int
        Entries of the lower grade, of a hundred: 0 to 100.
    recent : int
        Newest entries of every head that keep their form, at least 0.
    """

    high: str = "separable:4"
    low: str = "separable:2"
    percent: int = 40
    recent: int = 0

    def __post_init__(self) -> None:
        integer("grade", "percent", self.percent, 0)
        integer("grade", "recent", self.recent, 0)
        codec_named(self.high)
        codec_named(self.low)
        if self.percent > 100:
            raise ValueError(f"grade: percent={self.percent} is above 100; give the share of the low grade")

    def state(self) -> Graded:
        """What was graded so far."""
        return Graded()

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: Graded) -> Plan:
        """Turn scores and a budget into a plan for one layer."""
        segment, layer = seen.segment, seen.layer
        keep, heads = kept(scores, budget), segment.heads
        end = state.end.setdefault(layer, [0] * heads)
        of_low, of_all = state.low.setdefault(layer, [0] * heads), state.all.setdefault(layer, [0] * heads)
        lows: list[torch.Tensor] = []
        highs: list[torch.Tensor] = []
        for head, n in enumerate(scores.lengths.tolist()):
            stays = torch.arange(n) if keep is None else keep[head]
            where = segment.positions_of(head).cpu()[stays]
            fresh = stays[where >= end[head]]
            fresh = fresh[: max(0, len(fresh) - self.recent) // ENTRIES * ENTRIES]
            pages = len(fresh) // ENTRIES
            if pages:
                due = (of_all[head] + len(fresh)) * self.percent / 100 - of_low[head]
                count = min(max(round(due / ENTRIES), 0), pages) * ENTRIES
                order = scores.value[head].cpu()[fresh].sort(stable=True).indices
                low, high = fresh[order[:count]].sort().values, fresh[order[count:]].sort().values
                end[head] = int(segment.positions_of(head)[int(fresh[-1])]) + 1
                of_low[head] += count
                of_all[head] += len(fresh)
            else:
                low = high = fresh
            lows.append(low)
            highs.append(high)
        demote = tuple(
            Demotion(entries=tuple(lists), codec=codec)
            for codec, lists in ((self.low, lows), (self.high, highs))
            if any(map(len, lists))
        )
        return Plan(keep=keep, demote=demote)

    def truncated(self, layer: int, left: Sequence[Stored], tokens: int, state: Graded) -> None:
        """What comes in the place of graded entries is graded anew."""
        for head, end in enumerate(state.end.get(layer, ())):
            state.end[layer][head] = end = min(end, tokens)
            state.low[layer][head] = sum(int(s.lengths[head]) for s in left if s.codec == self.low)
            state.all[layer][head] = sum(int((s.positions_of(head) < end).sum()) for s in left)
