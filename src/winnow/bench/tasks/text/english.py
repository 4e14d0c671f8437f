"""The chronicle's English."""

from __future__ import annotations

from winnow.bench.tasks.text.chronicle import Language, Relation
from winnow.bench.tasks.text.names import ENGLISH_PEOPLE, ENGLISH_TOWNS, listed

__all__ = ["ENGLISH"]

TRADES = listed(
    "baker brewer carpenter cobbler cooper dyer falconer fletcher glazier goldsmith mason miller "
    "potter saddler scribe shepherd tailor tanner thatcher weaver"
)
THINGS = listed("bridge chapel granary hospital library lighthouse mill school tower well")
GOODS = listed("barrels of salt|bolts of linen|jars of honey|sacks of barley|sheep|oxen|bricks|candles", "|")

ENGLISH = Language(
    relations={
        "born": Relation(
            told=(
                "{person} was born in {place}.",
                "It was in {place} that {person} first saw the light of day.",
                "The parents of {person} had their home in {place} when the child came.",
            ),
            asked="In which town was {person} born?",
            wanted="place",
        ),
        "trade": Relation(
            told=(
                "{person} earned a living as a {trade}.",
                "The work of a {trade} fed {person} for many years.",
                "Whoever needed a {trade} went to see {person}.",
            ),
            asked="What was the trade of {person}?",
            wanted="trade",
        ),
        "built": Relation(
            told=(
                "In the year {year} {person} built the {thing} of {place}.",
                "The {thing} of {place} was raised in the year {year} by {person}.",
                "People of {place} owe their {thing} to {person}, who finished it in the year {year}.",
            ),
            asked="Who built the {thing} of {place} in the year {year}?",
            wanted="person",
        ),
        "bought": Relation(
            told=(
                "At the autumn fair {person} paid for {number} {goods}.",
                "The ledger shows that {number} {goods} were sold to {person}.",
            ),
            asked="How many {goods} did {person} buy?",
            wanted="number",
        ),
        "moved": Relation(
            told=(
                "Later {person} packed everything and settled in {other}.",
                "A new house in {other} became the home of {person} in old age.",
            ),
            asked="To which town did {person} move later?",
            wanted="other",
        ),
    },
    described="the person who built the {thing} of {place} in the year {year}",
    people=ENGLISH_PEOPLE,
    values={
        "place": lambda dice: dice.pick(ENGLISH_TOWNS),
        "other": lambda dice: dice.pick(ENGLISH_TOWNS),
        "trade": lambda dice: dice.pick(TRADES),
        "thing": lambda dice: dice.pick(THINGS),
        "year": lambda dice: str(1100 + dice.below(600)),
        "number": lambda dice: str(12 + dice.below(880)),
        "goods": lambda dice: dice.pick(GOODS),
        "person": lambda dice: dice.pick(ENGLISH_PEOPLE),
    },
    patterns={
        "person": r"[A-Z]\w+ [A-Z]\w+",
        "place": r"[A-Z]\w+",
        "other": r"[A-Z]\w+",
        "trade": r"[a-z]+",
        "thing": r"[a-z]+",
        "year": r"\d+",
        "number": r"\d+",
        "goods": r"[a-z ]+",
    },
    sentence=" ",
    paragraph="\n\n",
    stop=".",
)
