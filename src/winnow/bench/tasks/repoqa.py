"""Code-function retrieval by description, alone and mixed with key-value retrieval.

SCBench's Code.RepoQA and Mix.RepoQA+KV.  The descriptions are the docstrings of Python's standard
library, taken out of the code; SCBench's were written by a model for repositories of GitHub.
In the embedded form labels by category stand for the functions: something is found by its meaning
there, too.
"""

from __future__ import annotations

import re
from dataclasses import replace

from winnow.bench.tasks.embedded import read_document, wrap
from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.kv import ask_pair, pairs
from winnow.bench.tasks.task import Draft, Request, Task
from winnow.bench.tasks.text.fit import allowance, fit, joined, spread
from winnow.bench.tasks.text.source_code import (
    FENCE,
    GAP,
    Function,
    functions,
    haystack,
    listing,
    parse,
    pick,
)
from winnow.bench.tasks.text.templates import read_slots
from winnow.models.embedded.dice import Dice

__all__ = ["REPOQA", "REPOQA_KV"]

ASKED = "Which function does this? Repeat it in a code block.\n{description}"
ASKED_KEY = "What is the value of the setting {key}?"
JOIN = Join(
    opening=(
        "Below are functions of a code base. Find the one that fits a description and repeat it "
        "exactly, in a code block wrapped by ```.\n\n{context}"
    ),
    answer="\n{answer}",
)
JOIN_KV = Join(
    opening=(
        "Below are functions and settings of a code base. Repeat the function that fits a description "
        "exactly, in a code block wrapped by ```, or give the value of a setting.\n\n{context}"
    ),
    answer="\n{answer}",
)
#: the asked functions take at most this part of the text
SHARE = 0.75
#: characters by which a text grows; the smallest functions have ten times as many
UNIT = 16


def _ask_function(request: Request, function: Function, depth: float) -> Turn:
    answer = FENCE.format(code=function.code)
    return Turn(
        question=ASKED.format(description=function.description),
        answers=(answer,),
        scorer="code",
        max_new_tokens=allowance(request, answer),
        depth=depth,
    )


def _write(request: Request, join: Join, keys: int, settings: int) -> Draft:
    """Functions with ``settings`` lines of settings between them; ``keys`` turns ask for these."""
    wanted = request.turns - keys
    # The asked functions stay the same while the text around them is fitted.
    sample = GAP.join(listing(function) for function in functions()[:16])
    characters = request.length * len(sample) / request.count(sample)
    asked = pick(Dice(request.seed_text + "/asked"), wanted, int(SHARE * characters))

    def build(units: int) -> Draft:
        dice = Dice(request.seed_text)
        others = haystack(dice, units * UNIT, asked)
        chosen = spread(dice, settings, keys) if keys else []
        held = pairs(dice, settings, chosen, 0)
        blocks = [listing(function) for function in others]
        blocks += [f'SETTINGS["{key}"] = "{value}"' for key, value in held]
        order = dice.sample(range(len(blocks)), len(blocks))
        places = spread(dice, len(blocks) + wanted, wanted) if wanted else []
        for place, index in sorted((place, index) for index, place in enumerate(places)):
            order.insert(place, len(blocks) + index)
        blocks += [listing(function) for function in asked]
        text, depths = joined([blocks[index] for index in order], GAP)
        at = dict(zip(order, depths, strict=True))
        first = len(blocks) - wanted
        code = [_ask_function(request, f, at[first + i]) for i, f in enumerate(asked)]
        lines = [_ask_setting(request, held[index], at[len(others) + index]) for index in chosen]
        # Functions and settings take turns.
        turns = [turn for i in range(max(wanted, keys)) for turn in (*code[i : i + 1], *lines[i : i + 1])]
        return Draft(context=text, turns=tuple(turns), join=join)

    return fit(request, build, least=0)


def _ask_setting(request: Request, pair: tuple[str, str], depth: float) -> Turn:
    turn = ask_pair(request, pair, depth)
    return replace(turn, question=ASKED_KEY.format(key=pair[0]))


def write(request: Request) -> Draft:
    """Functions only."""
    return _write(request, JOIN, keys=0, settings=0)


def write_kv(request: Request) -> Draft:
    """Functions and settings, asked for by turns, a function first."""
    keys = request.turns // 2
    if request.knobs["settings"] < keys:
        raise ValueError(f"{keys} turns ask for settings; set settings to at least that many")
    return _write(request, JOIN_KV, keys=keys, settings=request.knobs["settings"])


def read(example: Example, turn: Turn) -> str:
    """Know by the corpus which function is described, and read its code in the context."""
    slots = read_slots(ASKED, turn.question)
    if slots is None:
        key = read_slots(ASKED_KEY, turn.question)
        assert key is not None, turn.question
        (value,) = re.findall(rf'^SETTINGS\["{key["key"]}"\] = "(.+)"$', example.context, re.MULTILINE)
        return str(value)
    (name,) = (f.name for f in functions() if f.description == slots["description"])
    return FENCE.format(code=parse(example.context)[name])


REPOQA = Task(
    name="repoqa",
    category="semantic",
    about="the function that a description fits, from Python's standard library",
    text=write,
    oracles={"text": read},
)
REPOQA_KV = Task(
    name="repoqa-kv",
    category="multi-task",
    about="functions by description and values of keys, by turns",
    text=write_kv,
    text_knobs={"settings": 4},
    embedded=wrap("labels+key-value"),
    embedded_knobs={"facts": 24, "shots": 1},
    oracles={"text": read, "embedded": read_document},
)
