"""What the engine expects of the parts of a compression.

A part is a frozen value. What changes while a sequence runs lives in a state that the part makes for
the sequence. State per entry must follow the entries: :meth:`Scorer.follow` is called whenever entries
of a layer were dropped, by a plan or by a rollback, :meth:`Action.truncated` after a rollback.

States are saved with a sequence. They are plain data (:mod:`winnow.compression.memory`) of the type that
the annotation of ``state`` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from winnow._check import integer
from winnow.store.codecs import EncodedSegment
from winnow.types import Budget, Glimpse, Needs, Observation, Plan, Profile, Scores, Segment

__all__ = ["Action", "BudgetRule", "Compress", "Plain", "Scorer", "Setting", "Stored"]

Stored = Segment | EncodedSegment
"""Entries of a layer as they lie in the store."""


class Plain:
    """Defaults of a part that asks for nothing, protects nothing and remembers nothing."""

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs()

    @property
    def protects(self) -> int:
        """No entry."""
        return 0

    def state(self) -> Any:
        """No state."""
        return None

    def watch(self, seen: Glimpse, state: Any) -> None:
        """Nothing is remembered."""

    def follow(self, layer: int, keep: Sequence[Tensor], state: Any) -> None:
        """Nothing was remembered."""

    def truncated(self, layer: int, left: Sequence[Stored], tokens: int, state: Any) -> None:
        """Nothing was remembered."""


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

    def state(self) -> Any:
        """State for one sequence; None for a part that has none. Must survive ``copy.deepcopy``."""
        ...

    def watch(self, seen: Glimpse, state: Any) -> None:
        """Take the attention mass of one call, where the part needs it."""
        ...

    def follow(self, layer: int, keep: Sequence[Tensor], state: Any) -> None:
        """Entries ``keep[h]`` of every head of a layer stayed, the others went."""
        ...

    def score(self, seen: Observation, state: Any) -> Scores:
        """Score the entries of one layer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a budget may depend on beside the scores.

    Attributes
    ----------
    layers : sequence of int
        Layers that are decided together, in the order of the scores.
    of : int
        Layers of the model.
    tokens : int
        Tokens of the sequence so far, dropped ones included.
    profile : Profile or None
    """

    layers: Sequence[int]
    of: int
    tokens: int
    profile: Profile | None = None


class BudgetRule(Protocol):
    """How many entries each head may hold."""

    @property
    def needs(self) -> Needs:
        """What the part asks of the engine."""
        ...

    @property
    def scope(self) -> Literal["layer", "model"]:
        """``layer`` decides layer by layer; ``model`` waits for the scores of all layers."""
        ...

    @property
    def least(self) -> int | None:
        """The smallest budget that a long head can be given; None where there is no such bound."""
        ...

    def state(self) -> Any:
        """State for one sequence; None for a part that has none. Must survive ``copy.deepcopy``."""
        ...

    def allocate(self, scores: Sequence[Scores], setting: Setting, state: Any) -> list[Budget]:
        """One budget per layer of ``setting.layers``."""
        ...


class Action(Protocol):
    """What happens to the entries that do not fit the budget, and to those that do."""

    @property
    def needs(self) -> Needs:
        """What the part asks of the engine."""
        ...

    def state(self) -> Any:
        """State for one sequence; None for a part that has none. Must survive ``copy.deepcopy``."""
        ...

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: Any) -> Plan:
        """Turn scores and a budget into a plan for one layer. Inputs are not changed."""
        ...

    def truncated(self, layer: int, left: Sequence[Stored], tokens: int, state: Any) -> None:
        """The sequence was cut to its first ``tokens`` tokens, which left a layer these segments."""
        ...


@dataclass(frozen=True, kw_only=True)
class Compress:
    """A compression: scores, a budget, an action, and when they act.

    Attributes
    ----------
    score : Scorer
    budget : BudgetRule
    act : Action
    turns : {"first", "every", "none"}
        Act at the end of the first prefill of a sequence only, as the published eviction
        methods do, at the end of every turn's prefill, or at the end of none.
    every : int
        While decoding, act again whenever so many tokens were added since it last acted; 0 never.
        Between two actions a head holds up to ``every`` entries more than its budget.
    block : int
        In those prefills act at every multiple of so many tokens too, so that no head ever holds more
        than its budget and one block; 0 at the end only. Whatever chunks the engine computes in, a
        block is read whole before the next begins.
    """

    score: Scorer
    budget: BudgetRule
    act: Action
    turns: Literal["first", "every", "none"] = "first"
    every: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        if self.turns not in ("first", "every", "none"):
            raise ValueError(f"compress: turns={self.turns!r} is unknown; give 'first', 'every' or 'none'")
        for name in ("every", "block"):
            integer("compress", name, getattr(self, name), 0, "tokens")
        if self.turns == "none" and (self.block or not self.every):
            raise ValueError(
                "compress: turns='none' acts while decoding alone; give every=... and leave block out"
            )
        least, protects = self.budget.least, self.score.protects
        if least is not None and least <= protects:
            raise ValueError(
                f"compress: a budget of {least} entries has no room beside the {protects} protected ones; "
                f"keep at least {protects + 1} or protect fewer"
            )

    @property
    def needs(self) -> Needs:
        """What the parts ask of the engine together."""
        return self.score.needs | self.budget.needs | self.act.needs
