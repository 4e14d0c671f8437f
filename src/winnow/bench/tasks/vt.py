"""Variable tracking: every variable that holds a value, over several hops (SCBench's and RULER's VT)."""

from __future__ import annotations

import re

from winnow.bench.tasks.embedded import read_document, wrap
from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Request, Task
from winnow.bench.tasks.text.fit import allowance, fit, joined
from winnow.bench.tasks.text.prose import sentence
from winnow.bench.tasks.text.strings import UPPER, letters, numbers
from winnow.bench.tasks.text.templates import read_slots
from winnow.models.embedded.dice import Dice

__all__ = ["TASK"]

JOIN = Join(
    opening="Memorise and track the chains of variable assignments hidden in the text below.\n\n{context}"
)
QUESTION = "Which variables are assigned the value {value}, directly or through other variables? List all."


def write(request: Request) -> Draft:
    """Chains of assignments, in order, hidden between sentences."""
    hops, chains = request.knobs["hops"], request.knobs["chains"]
    if request.turns > chains:
        raise ValueError(f"{chains} chains cannot be asked about {request.turns} times; set chains higher")
    facts = chains * (hops + 1)

    def build(n: int) -> Draft:
        dice = Dice(request.seed_text)
        names: dict[str, None] = {}
        while len(names) < facts:
            names[letters(dice, 5, UPPER)] = None
        values = numbers(dice, 10_000, 100_000, chains)
        listed = list(names)
        owners = [listed[c * (hops + 1) : (c + 1) * (hops + 1)] for c in range(chains)]
        lines = [sentence(dice) for _ in range(n)]
        places = sorted(dice.sample(range(n + facts), facts))
        # Chains are interleaved, each in its own order: a shuffled multiset says whose turn it is.
        order = dice.sample([chain for chain in range(chains) for _ in range(hops + 1)], facts)
        step = [0] * chains
        last_place = [0] * chains
        for place, chain in zip(places, order, strict=True):
            hop = step[chain]
            right = f"VAR {owners[chain][hop - 1]}" if hop else str(values[chain])
            lines.insert(place, f"VAR {owners[chain][hop]} = {right}")
            step[chain] += 1
            last_place[chain] = place
        text, depths = joined(lines)
        turns = tuple(
            Turn(
                question=QUESTION.format(value=values[chain]),
                answers=(", ".join(owners[chain]), *owners[chain]),
                scorer="set",
                max_new_tokens=allowance(request, ", ".join(owners[chain])),
                depth=depths[last_place[chain]],
            )
            for chain in dice.sample(range(chains), request.turns)
        )
        return Draft(context=text, turns=turns, join=JOIN)

    return fit(request, build, least=0)


def read(example: Example, turn: Turn) -> str:
    """Follow the assignments in the order in which they stand."""
    slots = read_slots(QUESTION, turn.question)
    assert slots is not None, turn.question
    holders: list[str] = []
    for left, right in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", example.context, re.MULTILINE):
        if right == slots["value"] or right in holders:
            holders.append(left)
    return ", ".join(holders)


TASK = Task(
    name="vt",
    category="string",
    about="every variable that holds a value, through chains of assignments",
    text=write,
    text_knobs={"chains": 6, "hops": 3},
    embedded=wrap("variables"),
    embedded_knobs={"facts": 32, "hops": 1},
    oracles={"text": read, "embedded": read_document},
)
