"""Key-value retrieval: the value of one key in a JSON object of random pairs (SCBench's Retr.KV)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from winnow.bench.tasks.embedded import read_document, wrap
from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Request, Task
from winnow.bench.tasks.text.fit import allowance, fit, joined, spread
from winnow.bench.tasks.text.strings import uuid
from winnow.models.embedded.dice import Dice

__all__ = ["TASK", "ask_pair", "pairs"]

JOIN = Join(
    opening="Extract the value that belongs to the given key in the JSON object below.\n\n{context}",
    question='\n\nKey: "{question}"\nThe value of this key is:',
)


def pairs(dice: Dice, n: int, asked: Sequence[int], near: int) -> list[tuple[str, str]]:
    """``n`` pairs with different keys; ``near`` keys start like each of the asked ones."""
    made = [(uuid(dice), uuid(dice)) for _ in range(n)]
    free = [index for index in range(n) if index not in set(asked)]
    twins = dice.sample(free, min(len(free), near * len(asked)))
    for i, twin in enumerate(twins):
        key, value = made[twin]
        made[twin] = (made[asked[i % len(asked)]][0][:8] + key[8:], value)
    assert len({key for key, _ in made}) == n, "128-bit keys collided"
    return made


def ask_pair(request: Request, pair: tuple[str, str], depth: float) -> Turn:
    """The question for the value of a pair's key."""
    key, value = pair
    return Turn(
        question=key,
        answers=(value,),
        scorer="string",
        max_new_tokens=allowance(request, value),
        depth=depth,
    )


def write(request: Request) -> Draft:
    """A JSON object as long as asked for."""

    def build(n: int) -> Draft:
        dice = Dice(request.seed_text)
        asked = spread(dice, n, request.turns)
        made = pairs(dice, n, asked, request.knobs["near"])
        text, depths = joined([f'"{key}": "{value}"' for key, value in made], ",\n")
        turns = tuple(ask_pair(request, made[index], depths[index]) for index in asked)
        return Draft(context="{\n" + text + "\n}", turns=turns, join=JOIN)

    return fit(request, build, least=request.turns * (1 + request.knobs["near"]))


def read(example: Example, turn: Turn) -> str:
    """Parse the object and look the key up."""
    held = json.loads(example.context)
    return str(held[turn.question])


TASK = Task(
    name="kv",
    category="string",
    about="the value of one key in a JSON object of random pairs",
    text=write,
    text_knobs={"near": 0},
    embedded=wrap("key-value"),
    embedded_knobs={"facts": 32},
    oracles={"text": read, "embedded": read_document},
)
