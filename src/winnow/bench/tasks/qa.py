"""Question answering over a chronicle: in English, by choice, and in Chinese.

SCBench's En.QA, En.MultiChoice and Zh.QA ask about novels that a model may have read; a generated
chronicle has never been read.  Questions put a fact in other words than the text, and with
``hops=2`` describe the person by another fact.
"""

from __future__ import annotations

from collections.abc import Sequence

from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Maker, Oracle, Request, Task
from winnow.bench.tasks.text.chinese import CHINESE, CHINESE_JOIN
from winnow.bench.tasks.text.chronicle import Fact, Language, Query, answer, query, tell
from winnow.bench.tasks.text.english import ENGLISH
from winnow.bench.tasks.text.fit import allowance, fit, joined, spread
from winnow.models.embedded.dice import Dice

__all__ = ["CHOICE_EN", "QA_EN", "QA_ZH"]

PARAGRAPH = 8
LETTERS = "ABCD"
JOIN_EN = Join(
    opening="Read the chronicle and answer the question. Be very concise in your answer.\n\n{context}"
)
JOIN_CHOICE = Join(
    opening="Read the chronicle and answer the question with the letter of the right choice.\n\n{context}"
)


def _written(language: Language, sentences: list[str]) -> tuple[str, list[float]]:
    """Sentences in paragraphs, and where each of them starts."""
    blocks = [sentences[at : at + PARAGRAPH] for at in range(0, len(sentences), PARAGRAPH)]
    text, starts = joined([language.sentence.join(block) for block in blocks], language.paragraph)
    depths: list[float] = []
    for block, start in zip(blocks, starts, strict=True):
        inside, offsets = joined(block, language.sentence)
        depths += [start + offset * len(inside) / len(text) for offset in offsets]
    return text, depths


def _choices(dice: Dice, language: Language, found: Query, facts: Sequence[Fact]) -> tuple[str, ...]:
    """The answer among other texts of the chronicle for the same slot, in random order.

    All choices stand in the chronicle, as far as it has enough of them: having read a name
    somewhere is no help.
    """
    told = dict.fromkeys(fact[found.slot] for fact in facts if fact["relation"] == found.relation)
    told.pop(found.answer)
    options = dict.fromkeys([found.answer, *dice.sample(list(told), min(len(told), len(LETTERS) - 1))])
    while len(options) < len(LETTERS):
        options[language.values[found.slot](dice)] = None
    return tuple(dice.sample(list(options), len(options)))


def _turn(request: Request, found: Query, depth: float, choices: tuple[str, ...]) -> Turn:
    if not choices:
        return Turn(
            question=found.question,
            answers=(found.answer,),
            scorer="phrase",
            max_new_tokens=allowance(request, found.answer),
            depth=depth,
        )
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True))
    letter = LETTERS[choices.index(found.answer)]
    return Turn(
        question=found.question + listed,
        answers=(letter, found.answer),
        scorer="choice",
        max_new_tokens=allowance(request, found.answer),
        depth=depth,
        choices=choices,
    )


def _maker(language: Language, join: Join, choice: bool) -> Maker:
    def write(request: Request) -> Draft:
        hops = request.knobs["hops"]
        if hops not in (1, 2):
            raise ValueError(f"a chronicle's questions take 1 or 2 hops, not {hops}")

        def build(n: int) -> Draft:
            dice = Dice(request.seed_text)
            facts, sentences = tell(dice, language, n)
            text, depths = _written(language, sentences)
            used: set[int] = set()
            found = [query(dice, language, facts, at, hops, used) for at in spread(dice, n, request.turns)]
            turns = tuple(
                _turn(request, q, depths[q.source], _choices(dice, language, q, facts) if choice else ())
                for q in found
            )
            return Draft(context=text, turns=turns, join=join)

        return fit(request, build, least=max(10, 3 * request.turns))

    return write


def _reader(language: Language) -> Oracle:
    return lambda example, turn: answer(language, example.context, turn.question)


def _read_choice(example: Example, turn: Turn) -> str:
    """Answer the question, then look the answer up among the choices as they are listed."""
    question, *listed = turn.question.split("\n")
    right = answer(ENGLISH, example.context, question)
    (letter,) = (line[0] for line in listed if line[3:] == right)
    return letter


QA_EN = Task(
    name="qa-en",
    category="semantic",
    about="questions about a generated chronicle in English",
    text=_maker(ENGLISH, JOIN_EN, choice=False),
    text_knobs={"hops": 1},
    oracles={"text": _reader(ENGLISH)},
)
CHOICE_EN = Task(
    name="choice-en",
    category="semantic",
    about="multiple choice about a generated chronicle in English",
    text=_maker(ENGLISH, JOIN_CHOICE, choice=True),
    text_knobs={"hops": 1},
    oracles={"text": _read_choice},
)
QA_ZH = Task(
    name="qa-zh",
    category="semantic",
    about="questions about a generated chronicle in Chinese",
    text=_maker(CHINESE, CHINESE_JOIN, choice=False),
    text_knobs={"hops": 1},
    oracles={"text": _reader(CHINESE)},
)
