"""Slide the sinks along: the first entries follow the window, in place and in rotation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow._check import integer
from winnow.compression.protocol import Plain
from winnow.types import Budget, Needs, Observation, Plan, Rewrite, Scores

__all__ = ["Slide"]


@dataclass
class SlideState:
    """Per layer the first entries as they were computed: keys, values and positions."""

    sinks: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Slide(Plain):
    """Keep the newest entries of every head and put the sinks right before them.

    StreamingLLM (arXiv 2309.17453) caches keys without rotation and turns them by their index in the
    cache at every step. The same attention, without turning anything but the sinks: the newest
    entries keep their slots and positions, and the oldest slots that stay are overwritten by the
    sinks, turned on to the positions of those slots. Keys are turned from the ones that were computed,
    never twice.

    Attributes
    ----------
    sinks : int
        First entries of the sequence that slide along, at least 0.
    """

    sinks: int = 4

    exempt = {  # noqa: RUF012 (read by the contract suite)
        "protected survive ties": "the window decides, not scores or protection",
        "best stay": "the window decides, not scores or protection",
        "refuses nonsense": "scores are not looked at",
    }

    def __post_init__(self) -> None:
        integer("slide", "sinks", self.sinks, 0)

    @property
    def needs(self) -> Needs:
        """The model's rotation."""
        return Needs(rotary=True)

    def state(self) -> SlideState:
        """Nothing has slid yet."""
        return SlideState()

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: SlideState) -> Plan:
        """Keep the newest, and rewrite the oldest of them. Scores are not looked at."""
        lengths, rooms = seen.segment.lengths.tolist(), budget.entries.tolist()
        if all(n <= room for n, room in zip(lengths, rooms, strict=True)):
            return Plan()
        if min(rooms) <= self.sinks:
            raise ValueError(
                f"slide: {self.sinks} sinks leave no room in a budget of {min(rooms)} entries; keep more"
            )
        keep = tuple(torch.arange(n - min(n, room), n) for n, room in zip(lengths, rooms, strict=True))
        if self.sinks == 0:
            return Plan(keep=keep)
        if seen.layer not in state.sinks:
            first = slice(0, self.sinks)
            at = torch.stack([seen.segment.positions_of(h)[first] for h in range(seen.segment.heads)])
            state.sinks[seen.layer] = (seen.segment.k[:, first].clone(), seen.segment.v[:, first].clone(), at)
        k_HND, v_HND, at_HN = state.sinks[seen.layer]
        rewrite = []
        for h, one in enumerate(keep):
            slots = one[: self.sinks]
            by = seen.segment.positions_of(h)[slots.to(at_HN.device)] - at_HN[h]
            k_ND = k_HND[h] if seen.rotary is None else seen.rotary.turn(k_HND[h], by)
            rewrite.append(Rewrite(entries=slots, k=k_ND, v=v_HND[h]))
        return Plan(keep=keep, rewrite=tuple(rewrite))
