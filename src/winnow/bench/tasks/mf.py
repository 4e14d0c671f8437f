"""Math find: extremes and the median of a list of integers (SCBench's Math.Find)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from winnow.bench.tasks.embedded import read_document, wrap
from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Request, Task
from winnow.bench.tasks.text.fit import allowance, fit
from winnow.bench.tasks.text.strings import numbers
from winnow.bench.tasks.text.templates import read_slots
from winnow.models.embedded.dice import Dice

__all__ = ["TASK"]

JOIN = Join(opening="Below is a list of integers.\n\n{context}")
#: fewer leave no room for extremes, more are no exact floating-point numbers
DIGITS = range(3, 16)
QUESTION = "What is the {kind} number in the list?"
#: what is asked for, from the sorted list of an odd number of integers
KINDS: dict[str, Callable[[Sequence[int]], int]] = {
    "largest": lambda s: s[-1],
    "smallest": lambda s: s[0],
    "median": lambda s: s[len(s) // 2],
    "second largest": lambda s: s[-2],
    "second smallest": lambda s: s[1],
    "third largest": lambda s: s[-3],
    "third smallest": lambda s: s[2],
}


def write(request: Request) -> Draft:
    """An odd number of integers; the three at either end occur once each."""
    digits = request.knobs["digits"]
    if digits not in DIGITS:
        raise ValueError(f"numbers have {DIGITS[0]} to {DIGITS[-1]} digits, not {digits}; change digits")
    if request.turns > len(KINDS):
        raise ValueError(f"there are {len(KINDS)} questions about a list; ask for at most that many turns")
    low, high = 10 ** (digits - 1), 10**digits
    edge = (high - low) // 20

    def build(n: int) -> Draft:
        dice = Dice(request.seed_text)
        n += 1 - n % 2
        listed = [low + edge + dice.below(high - low - 2 * edge) for _ in range(n)]
        ends = numbers(dice, low, low + edge, 3) + numbers(dice, high - edge, high, 3)
        for place, number in zip(dice.sample(range(n), 6), ends, strict=True):
            listed[place] = number
        ordered = sorted(listed)
        turns = tuple(
            Turn(
                question=QUESTION.format(kind=kind),
                answers=(str(KINDS[kind](ordered)),),
                scorer="number",
                max_new_tokens=allowance(request, str(high)),
                depth=None,
            )
            for kind in dice.sample(list(KINDS), request.turns)
        )
        return Draft(context=json.dumps(listed), turns=turns, join=JOIN)

    return fit(request, build, least=13)


def read(example: Example, turn: Turn) -> str:
    """Sort the list."""
    slots = read_slots(QUESTION, turn.question)
    assert slots is not None, turn.question
    return str(KINDS[slots["kind"]](sorted(json.loads(example.context))))


TASK = Task(
    name="mf",
    category="global",
    about="largest, smallest, median (and the next ones) of a list of integers",
    text=write,
    text_knobs={"digits": 5},
    embedded=wrap("extrema"),
    embedded_knobs={"facts": 32},
    oracles={"text": read, "embedded": read_document},
)
