"""What does not fit the budget goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.compression.protocol import Plain
from winnow.kernels.top_k import top_k
from winnow.types import Budget, Observation, Plan, Scores

__all__ = ["Drop", "kept", "kept_of_head"]


def kept(scores: Scores, budget: Budget) -> tuple[Tensor, ...] | None:
    """The entries of every head that stay, or None where all of them do.

    All protected entries, then the highest scores; among equal scores at the limit the later
    entry stays, so the result depends on nothing but the scores. Every head meets its budget
    exactly, or keeps everything where it holds no more than that.

    Returns
    -------
    tuple of Tensor, or None
        Per head ``[n]`` int64, ascending and unique.

    Raises
    ------
    ValueError
        If a head protects more entries than its budget, or a score is NaN.
    """
    lengths, entries = scores.lengths.tolist(), budget.entries.tolist()
    if all(n <= room for n, room in zip(lengths, entries, strict=True)):
        return None
    rooms = [min(n, room) for n, room in zip(lengths, entries, strict=True)]
    valid_HS = torch.arange(scores.value.shape[1], device=scores.value.device) < scores.lengths.to(
        scores.value.device
    ).unsqueeze(1)
    stays_HS = scores.protected & valid_HS
    if bool((scores.value.isnan() & valid_HS).any()):
        raise ValueError("a score is NaN, so there is no order to keep by; check the model's weights for NaN")
    free = [room - held for room, held in zip(rooms, stays_HS.sum(1).tolist(), strict=True)]
    for room, left in zip(rooms, free, strict=True):
        if left < 0:
            raise ValueError(
                f"{room - left} entries of a head are protected but its budget is {room}; "
                f"raise the budget or protect fewer"
            )
    open_HS = scores.value.masked_fill(stays_HS, -torch.inf)
    best, counts = top_k(open_HS, scores.lengths, torch.tensor(free, dtype=torch.int32))
    for h, (n, room, left, found) in enumerate(zip(lengths, rooms, free, counts.tolist(), strict=True)):
        if found == left:
            stays_HS[h, best[h, :found].long()] = True
        else:  # fewer finite scores than there is room for
            stays_HS[h, kept_of_head(scores.value[h, :n], scores.protected[h, :n], room)] = True
    return torch.split(stays_HS.nonzero()[:, 1], rooms)


def kept_of_head(value_S: Tensor, protected_S: Tensor, room: int) -> Tensor:
    """The same of one head, by sorting; ``room`` is at least the protected entries."""
    free = room - int(protected_S.sum())
    open_S = (~protected_S).nonzero().flatten().flip(0)
    # A stable sort of the latest first puts the latest of equal scores first.
    order = value_S[open_S].sort(descending=True, stable=True).indices[:free]
    return torch.cat([protected_S.nonzero().flatten(), open_S[order]]).sort().values


@dataclass(frozen=True, kw_only=True)
class Drop(Plain):
    """Keep what fits the budget by protection and score, drop the rest for good."""

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: None) -> Plan:
        """Turn scores and a budget into a plan for one layer."""
        return Plan(keep=kept(scores, budget))
