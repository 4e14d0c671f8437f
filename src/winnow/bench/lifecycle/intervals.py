"""Intervals and tests over examples: the turns of one example are not independent of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "Paired", "holm", "interval", "paired"]

Floats = NDArray[np.float64]

LEVEL = 0.95
_RESAMPLES = 2000
_FLIPS = 20_000
_EXACT = 14  # up to so many examples every assignment of signs is tried
_BATCH = 1 << 22  # resampled values held at a time


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over turns, and its bootstrap interval.

    Attributes
    ----------
    mean, low, high : float
    examples, turns : int
        What it rests on.
    """

    mean: float
    low: float
    high: float
    examples: int
    turns: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(self.__dict__)


def interval(
    groups: Sequence[Sequence[float]], *, level: float = LEVEL, resamples: int = _RESAMPLES
) -> Interval:
    """Mean over all values, with an interval from resampling whole groups.

    The expanded percentile interval (T. Hesterberg, "What Teachers Should Know about the
    Bootstrap", arXiv 1411.5279, section 4): percentile intervals of few examples are too narrow, so
    the percentiles are moved outwards as far as Student's t lies outside the normal distribution.
    Resampled means never leave the range of the examples, so that of ``n`` examples no such interval
    covers more than ``1 - 2 ** (1 - n)``: six are needed for 95 %.
    The random numbers are the same in every call.

    Parameters
    ----------
    groups : sequence of sequence of float
        The values of each example; none may be empty.
    level : float
        Intended coverage.
    resamples : int

    Raises
    ------
    ValueError
        Without any group.
    """
    sums, counts = _totals(groups)
    n = len(sums)
    mean = float(sums.sum() / counts.sum())
    low = high = mean
    if n > 1:
        tail = _expanded_tail(level, n)
        means = np.empty(resamples)
        random = np.random.default_rng(0)
        step = max(1, _BATCH // n)
        for at in range(0, resamples, step):
            drawn = random.integers(0, n, (min(step, resamples - at), n))
            means[at : at + step] = sums[drawn].sum(1) / counts[drawn].sum(1)
        low, high = (float(x) for x in np.quantile(means, (tail, 1 - tail)))
    return Interval(mean=mean, low=low, high=high, examples=n, turns=int(counts.sum()))


def _totals(groups: Sequence[Sequence[float]]) -> tuple[Floats, Floats]:
    if not groups or not all(len(group) for group in groups):
        raise ValueError("nothing to average; give at least one value for each example")
    sums = np.array([math.fsum(group) for group in groups])
    return sums, np.array([float(len(group)) for group in groups])


def _expanded_tail(level: float, n: int) -> float:
    """Share left out at each end: the normal tail of Student's quantile, widened by sqrt(n / (n - 1))."""
    student = _student_quantile((1 + level) / 2, n - 1)
    return NormalDist().cdf(-math.sqrt(n / (n - 1)) * student)


@cache
def _student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t: with t = sqrt(freedom) tan(a) the density is cos(a) ** (freedom - 1)."""
    angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angles).clip(0.0) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(p, mass / mass[-1], angles)))


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A mean difference over shared examples.

    Attributes
    ----------
    difference, low, high : float
        Second minus first: mean over examples, and its bootstrap interval.
    p : float
        Of the sign-flip test: chance of a mean difference at least as large, in either
        direction, if the sign of each example's difference were a coin's.
    least_p : float
        The smallest value that ``p`` could have taken with so many examples.
    examples : int
    """

    difference: float
    low: float
    high: float
    p: float
    least_p: float
    examples: int


def paired(differences: Sequence[float], *, level: float = LEVEL) -> Paired:
    """Test whether paired differences, one for each example, are noise.

    A sign-flip permutation test on the mean, exact for up to 14 examples and else over 20 000
    random assignments (the one that was seen among them); the interval is that of
    :func:`interval`.

    Raises
    ------
    ValueError
        Without any difference.
    """
    values = np.asarray(differences, dtype=np.float64)
    spread = interval([[float(v)] for v in values], level=level)
    n = len(values)
    if n <= _EXACT:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        flipped = np.abs((1 - 2 * bits) @ values)
        seen, least = 0, 2.0 / 2**n
    else:
        signs = np.random.default_rng(0).integers(0, 2, (_FLIPS, n), dtype=np.int8)
        flipped = np.abs((1 - 2 * signs) @ values)
        seen, least = 1, 1.0 / (_FLIPS + 1)
    # Sums of the same numbers in another order differ in their last bits.
    reached = int((flipped >= abs(float(values.sum())) - 1e-9 * np.abs(values).sum()).sum())
    p = (reached + seen) / (len(flipped) + seen)
    return Paired(
        difference=spread.mean, low=spread.low, high=spread.high, p=p, least_p=min(1.0, least), examples=n
    )


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of several p-values, in their order."""
    adjusted = [0.0] * len(values)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = worst
    return adjusted
