"""What does not fit the budget goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from winnow.compression.protocol import Plain
from winnow.types import Budget, Observation, Plan, Scores

__all__ = ["Drop", "kept"]


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
    return tuple(
        _kept_of_head(scores.value[h, :n], scores.protected[h, :n], min(n, room))
        for h, (n, room) in enumerate(zip(lengths, entries, strict=True))
    )


def _kept_of_head(value_S: Tensor, protected_S: Tensor, room: int) -> Tensor:
    free = room - int(protected_S.sum())
    if free < 0:
        raise ValueError(
            f"{room - free} entries of a head are protected but its budget is {room}; "
            f"raise the budget or protect fewer"
        )
    if bool(value_S.isnan().any()):
        raise ValueError("a score is NaN, so there is no order to keep by; check the model's weights for NaN")
    stays_S = protected_S.clone()
    if free:
        open_S = (~protected_S).nonzero().flatten()
        open_value_S = value_S[open_S]
        if free >= open_S.numel():
            stays_S[open_S] = True
        else:
            limit = open_value_S.topk(free).values[-1]
            above_S = open_value_S > limit
            stays_S[open_S[above_S]] = True
            at_limit = open_S[open_value_S == limit]
            stays_S[at_limit[at_limit.numel() - (free - int(above_S.sum())) :]] = True
    return stays_S.nonzero().flatten()


@dataclass(frozen=True, kw_only=True)
class Drop(Plain):
    """Keep what fits the budget by protection and score, drop the rest for good."""

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: None) -> Plan:
        """Turn scores and a budget into a plan for one layer."""
        return Plan(keep=kept(scores, budget))
