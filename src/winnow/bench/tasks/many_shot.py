"""Many-shot label induction: labels without meaning, learnt from the examples in the context.

SCBench takes tasks of BIG-Bench Hard whose labels a model may know.  Here eight categories of
things carry made-up labels, drawn anew for every example, and what is asked about is never one
of the examples: the label must be induced.
"""

from __future__ import annotations

import re

from winnow.bench.tasks.embedded import read_document, wrap
from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Request, Task
from winnow.bench.tasks.text.fit import allowance, fit, joined
from winnow.bench.tasks.text.prose import sentence
from winnow.models.embedded import language as lang
from winnow.models.embedded.dice import Dice

__all__ = ["TASK"]

JOIN = Join(
    opening=(
        "Each thing below has a label. Find out what the labels stand for, then label new things "
        "in the same way. Answer with the label only.\n\n{context}"
    ),
    question="\n\nThing: {question}\nLabel:",
)
WORDS = tuple(tuple(noun.strip() for noun in nouns) for nouns in lang.CATEGORIES)
LABELS = tuple(label.strip() for label in lang.LABELS)


def write(request: Request) -> Draft:
    """Examples that fill the length, or a few of each label hidden between sentences."""
    shown, shots = request.knobs["shown"], request.knobs["shots"]
    asked = len(WORDS) * (len(WORDS[0]) - shown)
    if not 1 <= shown < len(WORDS[0]) or request.turns > asked:
        raise ValueError(
            f"shown={shown} of {len(WORDS[0])} things leave {asked} to ask about; ask for at most that many"
        )

    def build(n: int) -> Draft:
        dice = Dice(request.seed_text)
        labels = dice.sample(LABELS, len(WORDS))
        kinds = [dice.sample(words, len(words)) for words in WORDS]
        lines: list[str] = []
        if shots:
            lines = [sentence(dice) for _ in range(n)]
        # Whole rounds keep the labels balanced: the first one shows every category.
        rounds = shots or -(-(n + len(WORDS)) // len(WORDS))
        examples = [
            f"Thing: {kind[turn % shown]}\nLabel: {label}"
            for turn in range(rounds)
            for kind, label in dice.sample(list(zip(kinds, labels, strict=True)), len(labels))
        ]
        if not shots:
            examples = examples[: n + len(WORDS)]
        for example in examples:
            lines.insert(dice.below(len(lines) + 1) if shots else len(lines), example)
        text, _ = joined(lines, "\n\n" if not shots else "\n")
        pairs = [(word, label) for kind, label in zip(kinds, labels, strict=True) for word in kind[shown:]]
        turns = tuple(
            Turn(
                question=word,
                answers=(label,),
                scorer="label",
                max_new_tokens=allowance(request, label, talk=8),
                depth=None,
            )
            for word, label in dice.sample(pairs, request.turns)
        )
        return Draft(context=text, turns=turns, join=JOIN)

    return fit(request, build, least=0)


def read(example: Example, turn: Turn) -> str:
    """Look for things of the same category."""
    (words,) = (words for words in WORDS if turn.question in words)
    found = re.findall(r"^Thing: (.+)\nLabel: (.+)$", example.context, re.MULTILINE)
    (label,) = {label for word, label in found if word in words}
    return str(label)


TASK = Task(
    name="many-shot",
    category="global",
    about="made-up labels of things, induced from examples",
    text=write,
    text_knobs={"shown": 8, "shots": 0},
    embedded=wrap("labels"),
    embedded_knobs={"shots": 1},
    oracles={"text": read, "embedded": read_document},
)
