"""Scorers: how right an answer is, from 0 to 1.  No scorer keeps anything between calls."""

from __future__ import annotations

from collections.abc import Callable

from winnow.bench.tasks.example import Turn

__all__ = ["SCORERS", "Scorer"]

#: from a turn and a model's answer to a score in 0..1
Scorer = Callable[[Turn, str], float]


def value(turn: Turn, answer: str) -> float:
    """The first line of the answer, after its last ``=`` if it has one, is one of the answers' values."""
    line = answer.strip().split("\n", 1)[0]
    given = line.rsplit("=", 1)[-1].strip()
    return float(given in {right.rsplit("=", 1)[-1].strip() for right in turn.answers})


SCORERS: dict[str, Scorer] = {"value": value}
