"""Prefix-suffix search: the string that starts and ends as given (SCBench's Retr.Prefix-Suffix)."""

from __future__ import annotations

from winnow.bench.tasks.embedded import read_document, wrap
from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Request, Task
from winnow.bench.tasks.text.fit import allowance, fit, joined, shuffled, spread
from winnow.bench.tasks.text.strings import LOWER, letters
from winnow.bench.tasks.text.templates import read_slots
from winnow.models.embedded.dice import Dice

__all__ = ["TASK"]

JOIN = Join(
    opening="Below is a list of strings, one on each line.\n\n{context}",
    question="\n\nQuestion: {question}\nAnswer:",
)
QUESTION = "Which string starts with {prefix} and ends with {suffix}? Repeat the whole string."


def write(request: Request) -> Draft:
    """Lines of random strings; near misses share the prefix or the suffix of what is asked for."""
    size, affix, near = (request.knobs[name] for name in ("size", "affix", "near"))
    if size <= 2 * affix:
        raise ValueError(f"size={size} must exceed twice affix={affix}; make size larger")

    def build(n: int) -> Draft:
        dice = Dice(request.seed_text)
        made = [letters(dice, size, LOWER) for _ in range(n)]
        goals = made[: request.turns]
        at = request.turns
        for goal in goals:
            for _ in range(near):
                made[at] = goal[:affix] + made[at][affix:]
                made[at + 1] = made[at + 1][:-affix] + goal[-affix:]
                at += 2
        # The asked strings go to places spread over the text, all others anywhere.
        places = spread(dice, n, request.turns)
        taken = set(places)
        others = [place for place in shuffled(dice, n) if place not in taken]
        lines = [""] * n
        for place, string in zip(places + others, made, strict=True):
            lines[place] = string
        text, depths = joined(lines)
        turns = tuple(
            Turn(
                question=QUESTION.format(prefix=goal[:affix], suffix=goal[-affix:]),
                answers=(goal,),
                scorer="string",
                max_new_tokens=allowance(request, goal),
                depth=depths[place],
            )
            for goal, place in zip(goals, places, strict=True)
        )
        return Draft(context=text, turns=turns, join=JOIN)

    return fit(request, build, least=request.turns * (1 + 2 * near))


def read(example: Example, turn: Turn) -> str:
    """Try every line."""
    slots = read_slots(QUESTION, turn.question)
    assert slots is not None, turn.question
    prefix, suffix = slots["prefix"], slots["suffix"]
    (line,) = (s for s in example.context.split("\n") if s.startswith(prefix) and s.endswith(suffix))
    return line


TASK = Task(
    name="prefix-suffix",
    category="string",
    about="the string in a list that starts and ends as given",
    text=write,
    text_knobs={"size": 48, "affix": 8, "near": 1},
    embedded=wrap("prefix-suffix"),
    embedded_knobs={"facts": 32},
    oracles={"text": read, "embedded": read_document},
)
