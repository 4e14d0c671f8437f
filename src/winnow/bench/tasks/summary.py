"""Summaries with checkable facts, alone and mixed with needles.

SCBench's En.Sum and Mix.Sum+NIAH compare a summary of papers with a reference by ROUGE, which
rewards its wording.  Here a context is the reports on several towns; a turn asks to summarise one of
them, and the score is the share of its facts that the summary holds.  The facts are names and
numbers that stand in that report only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from winnow.bench.tasks.embedded import read_document, wrap
from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Request, Task
from winnow.bench.tasks.text.fit import allowance, fit, joined, spread
from winnow.bench.tasks.text.names import ENGLISH_PEOPLE, ENGLISH_PLACES, ENGLISH_TOWNS
from winnow.bench.tasks.text.prose import sentence
from winnow.bench.tasks.text.strings import numbers
from winnow.bench.tasks.text.templates import compiled, read_slots
from winnow.models.embedded.dice import Dice

__all__ = ["SUMMARY", "SUMMARY_NEEDLES"]

#: slot of a report, how the report tells it and how a summary does
FACTS = {
    "reeve": ("The reeve who signs this report is {reeve}.", "its reeve is {reeve}"),
    "founder": ("As the oldest charter has it, the town was founded by {founder}.", "{founder} founded it"),
    "households": ("At the last count there were {households} households.", "it has {households} households"),
    "harvest": ("The harvest filled {harvest} carts.", "its harvest was {harvest} carts"),
    "debt": ("The town still owes {debt} crowns to the bishop.", "it owes {debt} crowns"),
    "envoy": ("In spring {envoy} was sent to the court as envoy.", "its envoy was {envoy}"),
}
NAMES = ("reeve", "founder", "envoy")
ASKED = (
    "Summarise the report on {town}: its reeve, founder and envoy, and the numbers of its households, "
    "of the carts of its harvest and of the crowns of its debt."
)
GOLDEN = "{town}: " + "; ".join(short for _, short in FACTS.values()) + "."
NEEDLE = "The secret number of {place} is {number}."
ASKED_NEEDLE = "What is the secret number of {place}?"
HEADING = "Report on {town}"
JOIN = Join(opening="Below are the reports on several towns.\n\n{context}")
JOIN_NEEDLES = Join(
    opening=(
        "Below are the reports on several towns. Some secret numbers are hidden in them; memorise these."
        "\n\n{context}"
    )
)


def _reports(dice: Dice, n: int) -> list[dict[str, str]]:
    """The facts of ``n`` towns; no name and no number occurs in two of them."""
    towns = dice.sample(ENGLISH_TOWNS if n <= len(ENGLISH_TOWNS) else ENGLISH_PLACES, n)
    people = iter(dice.sample(ENGLISH_PEOPLE, n * len(NAMES)))
    counts = iter(numbers(dice, 1000, 1000 + 40 * max(100, n), n * (len(FACTS) - len(NAMES))))
    return [
        {"town": town} | {slot: next(people) if slot in NAMES else str(next(counts)) for slot in FACTS}
        for town in towns
    ]


def _written(dice: Dice, report: dict[str, str], filler: int, extra: Sequence[str]) -> str:
    """A report: its facts in their order, other sentences anywhere between."""
    lines = [told.format(**report) for told, _ in FACTS.values()]
    for other in [*(sentence(dice) for _ in range(filler)), *extra]:
        lines.insert(dice.below(len(lines) + 1), other)
    return HEADING.format(**report) + "\n" + " ".join(lines)


def _ask_summary(request: Request, report: dict[str, str], depth: float) -> Turn:
    golden = GOLDEN.format(**report)
    return Turn(
        question=ASKED.format(**report),
        answers=(golden, *(report[slot] for slot in FACTS)),
        scorer="facts",
        max_new_tokens=2 * allowance(request, golden),
        depth=depth,
    )


def _write(request: Request, join: Join, needles: int) -> Draft:
    """Reports in a row; of the turns every second one asks for a needle if there are any."""
    asked = request.turns // 2 if needles else 0
    size = request.knobs["sentences"]

    def build(n: int) -> Draft:
        dice = Dice(request.seed_text)
        reports = _reports(dice, max(request.turns, n // (len(FACTS) + size)))
        filler = max(0, n - len(FACTS) * len(reports))
        # Report r has the sentences that are its share of all; so a single one more changes the length.
        shares = [(r + 1) * filler // len(reports) - r * filler // len(reports) for r in range(len(reports))]
        places = dice.sample(ENGLISH_PLACES[len(ENGLISH_TOWNS) :], needles)
        secrets = numbers(dice, 1_000_000, 10_000_000, needles)
        hidden = [NEEDLE.format(place=p, number=k) for p, k in zip(places, secrets, strict=True)]
        homes = [dice.below(len(reports)) for _ in range(needles)]
        blocks = [
            _written(dice, report, shares[r], [hidden[i] for i in range(needles) if homes[i] == r])
            for r, report in enumerate(reports)
        ]
        text, depths = joined(blocks, "\n\n")
        turns: list[Turn] = []
        wanted = spread(dice, len(reports), request.turns - asked)
        chosen = dice.sample(range(needles), asked)
        for i, index in enumerate(wanted):
            turns.append(_ask_summary(request, reports[index], depths[index]))
            if i < asked:
                needle = hidden[chosen[i]]
                turns.append(
                    Turn(
                        question=ASKED_NEEDLE.format(place=places[chosen[i]]),
                        answers=(str(secrets[chosen[i]]),),
                        scorer="string",
                        max_new_tokens=allowance(request, str(secrets[chosen[i]])),
                        depth=text.index(needle) / len(text),
                    )
                )
        return Draft(context=text, turns=tuple(turns), join=join)

    return fit(request, build, least=len(FACTS) * request.turns)


def write(request: Request) -> Draft:
    """Reports only."""
    return _write(request, JOIN, needles=0)


def write_needles(request: Request) -> Draft:
    """Reports with needles, asked for by turns, a summary first."""
    needles = request.knobs["needles"]
    if needles < max(1, request.turns // 2):
        raise ValueError(f"{request.turns // 2} turns ask for needles; set needles to at least that many")
    return _write(request, JOIN_NEEDLES, needles=needles)


def read(example: Example, turn: Turn) -> str:
    """Find the report, read its facts and put them into a sentence; or find the needle."""
    asked = read_slots(ASKED_NEEDLE, turn.question)
    if asked is not None:
        (number,) = compiled(NEEDLE.format(number="{number}", **asked), {}).findall(example.context)
        return str(number)
    asked = read_slots(ASKED, turn.question)
    assert asked is not None, turn.question
    (report,) = (
        block for block in example.context.split("\n\n") if block.startswith(HEADING.format(**asked) + "\n")
    )
    found = dict(asked)
    for slot, (told, _) in FACTS.items():
        match = re.search(compiled(told, {}), report)
        assert match is not None, slot
        found[slot] = match[1]
    return GOLDEN.format(**found)


SUMMARY = Task(
    name="summary",
    category="global",
    about="summary of one of several reports, scored by the share of its facts",
    text=write,
    text_knobs={"sentences": 12},
    oracles={"text": read},
)
SUMMARY_NEEDLES = Task(
    name="summary-needles",
    category="multi-task",
    about="summaries and hidden numbers, by turns",
    text=write_needles,
    text_knobs={"sentences": 12, "needles": 4},
    embedded=wrap("needles+key-value"),
    embedded_knobs={"facts": 32},
    oracles={"text": read, "embedded": read_document},
)
