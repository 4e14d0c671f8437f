"""Joint recall: the value of a key within a named context (arXiv 2507.00449).

Every context holds the same keys with other values, so a key alone decides nothing: the right
entry depends on context and key together.
"""

from __future__ import annotations

import re

from winnow.bench.tasks.embedded import read_document, wrap
from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Request, Task
from winnow.bench.tasks.text.fit import allowance, fit, joined, shuffled, spread
from winnow.bench.tasks.text.names import ENGLISH_PLACES
from winnow.bench.tasks.text.strings import UPPER, letters
from winnow.bench.tasks.text.templates import read_slots
from winnow.models.embedded import language as lang
from winnow.models.embedded.dice import Dice

__all__ = ["TASK"]

JOIN = Join(
    opening=(
        "Below are the records of several archives. The same key has another value in every archive."
        "\n\n{context}"
    )
)
QUESTION = "What is the value of the key {key} in the archive of {place}?"
KEYS = tuple(noun.strip() for nouns in lang.CATEGORIES for noun in nouns)


def write(request: Request) -> Draft:
    """Archives one after another, or all their lines shuffled (then every line names its archive)."""
    keys, scattered = request.knobs["keys"], request.knobs["scattered"]
    if not 1 <= keys <= len(KEYS):
        raise ValueError(f"keys={keys} must lie in 1..{len(KEYS)}")

    def build(n: int) -> Draft:
        dice = Dice(request.seed_text)
        named = dice.sample(KEYS, keys)
        count = -(-n // keys)
        if count > len(ENGLISH_PLACES):
            raise ValueError(f"{n} records need {count} archives, more than there are names; set keys higher")
        places = dice.sample(ENGLISH_PLACES, count)
        records = [
            (place, key, f"{letters(dice, 2, UPPER)}-{1000 + dice.below(9000)}")
            for place in places
            for key in dice.sample(named, keys)
        ][:n]
        if scattered:
            records = [records[index] for index in shuffled(dice, n)]
        lines: list[str] = []
        at: list[int] = []
        for index, (place, key, value) in enumerate(records):
            if not scattered and (index == 0 or records[index - 1][0] != place):
                lines.append(f"[archive of {place}]")
            at.append(len(lines))
            lines.append(f"archive of {place}, {key}: {value}" if scattered else f"{key}: {value}")
        text, depths = joined(lines)
        asked = spread(dice, n, request.turns)
        turns = tuple(
            Turn(
                question=QUESTION.format(key=records[index][1], place=records[index][0]),
                answers=(records[index][2],),
                scorer="string",
                max_new_tokens=allowance(request, records[index][2]),
                depth=depths[at[index]],
            )
            for index in asked
        )
        return Draft(context=text, turns=turns, join=JOIN)

    return fit(request, build, least=max(2 * keys, request.turns))


def read(example: Example, turn: Turn) -> str:
    """Walk the lines, remembering whose archive they stand in."""
    slots = read_slots(QUESTION, turn.question)
    assert slots is not None, turn.question
    inside = ""
    for line in example.context.split("\n"):
        if heading := re.fullmatch(r"\[archive of (.+)\]", line):
            inside = heading[1]
        elif record := re.fullmatch(r"(?:archive of (.+), )?(.+): (.+)", line):
            place, key, value = record.groups()
            if (place or inside, key) == (slots["place"], slots["key"]):
                return str(value)
    raise AssertionError(f"no record answers {turn.question!r}")


TASK = Task(
    name="joint-recall",
    category="string",
    about="the value of a key within a named context",
    text=write,
    text_knobs={"keys": 8, "scattered": 0},
    embedded=wrap("joint-recall"),
    embedded_knobs={"facts": 32, "contexts": 4},
    oracles={"text": read, "embedded": read_document},
)
