"""Texts of a wanted number of tokens, and questions spread over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from winnow.bench.tasks.task import Draft, Request
from winnow.models.embedded.dice import Dice

__all__ = ["allowance", "fit", "joined", "shuffled", "spread"]

#: a model may wrap its answer into this many tokens of talk
TALK = 24
TOLERANCE = 0.05
#: a text of that part of the length is not fitted further
ENOUGH = 0.995


def fit(request: Request, build: Callable[[int], Draft], *, least: int) -> Draft:
    """Find the number of units whose opening has as many tokens as asked for.

    Tokens are close to linear in units, so the slope finds the number in a few builds, each linear
    in the length; the growing text is not tokenised unit by unit.

    Parameters
    ----------
    request : Request
        Gives the length and the tokenizer's ``count``.
    build : callable
        From a number of units to a draft; the same number gives the same draft.
    least : int
        Fewest units that hold all turns.

    Returns
    -------
    Draft
        At most the length asked for where a unit's size allows it, else within 5 % of it.

    Raises
    ------
    ValueError
        If ``least`` units are too long already, or one unit is too coarse for the length.
    """
    drafts: dict[int, Draft] = {}
    tokens: dict[int, int] = {}

    def measure(units: int) -> int:
        if units not in tokens:
            drafts[units] = build(units)
            tokens[units] = request.count(drafts[units].join.open(drafts[units].context))
        return tokens[units]

    if measure(least) > request.length:
        raise ValueError(
            f"{request.length} tokens cannot hold {request.turns} turns of this difficulty "
            f"({measure(least)} tokens at least); ask for more tokens, fewer turns or easier knobs"
        )
    units = 2 * least + 16
    for _ in range(16):
        if units in tokens or ENOUGH * request.length <= measure(units) <= request.length:
            break
        # The chord from the shortest text: neighbouring numbers of units differ by chance, too.
        slope = max(1e-3, (measure(units) - measure(least)) / (units - least))
        # A unit below the length, and by steps, since short texts are a rough guide to long ones.
        wanted = units + round((request.length - measure(units)) / slope - 0.5)
        units = max(least, min(wanted, 8 * units))
    best = max((units for units, size in tokens.items() if size <= request.length), key=tokens.__getitem__)
    # The chord may stop a few units early: add them one by one, the last one may be too much.
    while tokens[best] < (1 - TOLERANCE) * request.length:
        more = best + 1
        if measure(more) > request.length:
            best = min(best, more, key=lambda units: abs(tokens[units] - request.length))
            break
        best = more
    if abs(tokens[best] - request.length) > TOLERANCE * request.length:
        raise ValueError(f"no text within 5 % of {request.length} tokens; the nearest has {tokens[best]}")
    return drafts[best]


def joined(lines: Sequence[str], separator: str = "\n") -> tuple[str, list[float]]:
    """The joined lines, and how deep in the text each of them starts (0 to 1)."""
    text = separator.join(lines)
    starts = accumulate((len(line) + len(separator) for line in lines[:-1]), initial=0)
    return text, [start / max(1, len(text)) for start in starts]


def spread(dice: Dice, n: int, turns: int) -> list[int]:
    """``turns`` of ``range(n)``, one from each of as many equal stretches, in random order."""
    if turns > n:
        raise ValueError(f"there are {n} things to ask about, not {turns}; ask for fewer turns")
    edges = [turn * n // turns for turn in range(turns + 1)]
    chosen = [start + dice.below(stop - start) for start, stop in pairwise(edges)]
    return dice.sample(chosen, turns)


def shuffled(dice: Dice, n: int) -> list[int]:
    """``range(n)`` in random order."""
    return dice.sample(range(n), n)


def allowance(request: Request, answer: str, talk: int = TALK) -> int:
    """Tokens for an answer: its own and some for the words around it."""
    return request.count(answer) + talk
