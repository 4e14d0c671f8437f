"""What the engine expects of the parts of a compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from winnow.types import Budget, Needs, Observation, Plan, Scores

__all__ = ["Action", "BudgetRule", "Compress", "Scorer"]


class Scorer(Protocol):
    """Importance of every entry of one layer."""

    @property
    def needs(self) -> Needs:
        """What the part asks of the engine."""
        ...

    @property
    def protects(self) -> int:
        """Entries per head that are protected once a head holds that many."""
        ...

    def score(self, seen: Observation) -> Scores:
        """Score the entries of one layer."""
        ...


class BudgetRule(Protocol):
    """How many entries each head may hold."""

    @property
    def scope(self) -> Literal["layer", "model"]:
        """``layer`` decides layer by layer; ``model`` waits for the scores of all layers."""
        ...

    @property
    def least(self) -> int | None:
        """The smallest budget that a long head can be given; None where there is no such bound."""
        ...

    def allocate(self, scores: Sequence[Scores], layers: Sequence[int], of: int) -> list[Budget]:
        """One budget per layer listed in ``layers``; ``of`` is the model's number of layers."""
        ...


class Action(Protocol):
    """What happens to the entries that do not fit the budget."""

    def plan(self, scores: Scores, budget: Budget) -> Plan:
        """Turn scores and a budget into a plan for one layer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Compress:
    """A compression: scores, a budget, an action, and when they act.

    Attributes
    ----------
    score : Scorer
    budget : BudgetRule
    act : Action
    turns : {"first", "every"}
        Act at the end of the first prefill of a sequence only, as the published eviction
        methods do, or at the end of every turn's prefill.
    """

    score: Scorer
    budget: BudgetRule
    act: Action
    turns: Literal["first", "every"] = "first"

    def __post_init__(self) -> None:
        if self.turns not in ("first", "every"):
            raise ValueError(f"compress: turns={self.turns!r} is unknown; give 'first' or 'every'")
        least, protects = self.budget.least, self.score.protects
        if least is not None and least <= protects:
            raise ValueError(
                f"compress: a budget of {least} entries has no room beside the {protects} protected ones; "
                f"keep at least {protects + 1} or protect fewer"
            )

    @property
    def needs(self) -> Needs:
        """What the parts ask of the engine together."""
        return self.score.needs
