"""Documents and turns for the embedded model, generated from a seed.

A document is lines of filler with facts at random places; a turn asks for one of them.

=============  ==================================  =========================  =============
task           facts                               question                   answer
=============  ==================================  =========================  =============
``key-value``  ``key bako -> 48-21``               ``key bako``               ``48-21``
``needles``    ``The code of bako is 48-21.``      ``the code of bako``       ``48-21``
``variables``  ``set zimu = bako``,                ``set zimu``               ``48-21``
               ``set bako = 48-21``
``labels``     ``label apple : dax``               ``label pear``             ``dax``
``prefix-      ``string badimu-48``                ``string ba...-48``       ``badimu-48``
suffix``
``extrema``    ``level 48``                        ``largest level``          ``48``
``joint-       ``context attic``,                  ``context attic key bako`` ``48-21``
recall``       ``key bako -> 48-21``
=============  ==================================  =========================  =============

Mixtures join facts of several kinds in one document: those that `MIXTURES` names.

The model answers a variable with its chain, ``bako = 48-21``; only the last value counts.
In ``labels`` the noun asked for is never one of the examples: its category decides.  In
``prefix-suffix`` about four strings share each beginning and four each ending, no two both.
In ``joint-recall`` a heading opens a section, and the same keys stand in every section with
other values.

The same arguments give the same bytes on every machine and Python (`Dice`).  Seeds in
`HELD_OUT` are for evaluation, demonstration and benchmarks; training refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from winnow.models.embedded import language as lang
from winnow.models.embedded.dice import Dice
from winnow.models.embedded.facts import Ask, Facts, Kind, Knobs, Pieces, write

__all__ = ["HELD_OUT", "MIXTURES", "TASKS", "Document", "Task", "Turn", "make", "prompt", "score"]

Task = Kind | Literal["mixed", "needles+key-value", "labels+key-value", "joint-recall+needles"]
Filler = Literal["sentences", "words", "noise"]

MIXTURES: dict[Task, tuple[Kind, ...]] = {
    "mixed": ("labels", "key-value", "needles", "variables"),
    "needles+key-value": ("needles", "key-value"),
    "labels+key-value": ("labels", "key-value"),
    "joint-recall+needles": ("joint-recall", "needles"),
}
KINDS: dict[Task, tuple[Kind, ...]] = {
    "key-value": ("key-value",),
    "needles": ("needles",),
    "variables": ("variables",),
    "labels": ("labels",),
    "prefix-suffix": ("prefix-suffix",),
    "extrema": ("extrema",),
    "joint-recall": ("joint-recall",),
    **MIXTURES,
}
TASKS: tuple[Task, ...] = tuple(KINDS)
HELD_OUT = range(1_000_000)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question about a document.

    Attributes
    ----------
    question : str
        Without the ``Q:`` and the ``A:`` around it, which `prompt` and the chat template add.
    answer : str
        The value that counts.
    reply : str
        What the model is trained to write: `answer`, for variables with the chain before it.
    sources : tuple of (int, int)
        Where in the document's text the facts lie on which the answer rests, as character
        ranges in the order in which they are needed.
    """

    question: str
    answer: str
    reply: str
    sources: tuple[tuple[int, int], ...]
    question_pieces: Pieces = field(repr=False)
    reply_pieces: Pieces = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text, the turns that ask about it, and what it was made from.

    ``tokens`` counts those of the text with the beginning-of-sequence token, without the turns.
    """

    task: Task
    seed: int
    text: str
    tokens: int
    turns: tuple[Turn, ...]
    pieces: Pieces = field(repr=False)


def _sentence(dice: Dice, filler: Filler) -> Pieces:
    """One line of filler: a sentence, random words of the language, or random characters."""
    if filler == "words":
        return tuple(dice.pick(_WORDS) for _ in range(4 + dice.below(12)))
    if filler == "noise":
        return tuple(dice.pick(lang.CHARACTERS + lang.BYTES) for _ in range(4 + dice.below(12)))
    subject: Pieces = (dice.pick(lang.OPENERS), dice.pick(lang.SUBJECTS))
    if dice.chance(0.6):
        subject = (subject[0], dice.pick(lang.ADJECTIVES), subject[1])
    thing: Pieces = (dice.pick((" the", " a", " one", " some")), dice.pick(lang.OBJECTS))
    if dice.chance(0.4):
        thing = (thing[0], dice.pick(lang.ADJECTIVES), thing[1])
    rest: Pieces = (dice.pick(lang.LINKS), " the", dice.pick(lang.PLACES))
    if dice.chance(0.5):
        rest = (*rest, dice.pick(lang.TIMES))
    return (*subject, dice.pick(lang.VERBS), *thing, *rest, lang.STOP)


#: what random lines of words are made of: every word but single characters and what gives a line its meaning
_WORDS = tuple(
    piece
    for piece in lang.vocabulary()
    if len(piece) > 1
    and piece not in lang.SPECIAL + lang.BYTES + lang.SEPARATORS + (lang.QUESTION,)
    and piece not in lang.LATER
)


def make(
    task: Task,
    *,
    tokens: int,
    seed: int,
    turns: int = 8,
    facts: int = 32,
    hops: int = 1,
    shots: int = 1,
    contexts: int = 4,
    filler: Filler = "sentences",
) -> Document:
    """Generate a document and its turns.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    tokens : int
        Most tokens of the text with its beginning-of-sequence token; filler fills it to within
        one sentence (16 tokens).
    seed : int
        Non-negative.  Seeds in `HELD_OUT` (the first million) are never trained on.
    turns : int
        Questions, each about another fact or noun.
    facts : int
        Lines of facts; a chain of variables takes ``hops + 1`` of them, series share them evenly, and
        so do the kinds of a mixture.  ``labels`` ignores it (8 categories times ``shots``), mixtures
        add the labels to it.  ``joint-recall`` has ``facts // contexts`` keys.
    hops : int
        Links from the variable asked for to the one that has a value.
    shots : int
        Examples of each label.
    contexts : int
        Sections of ``joint-recall``.
    filler : str
        ``sentences``, or harsher ones for training and stress: ``words``, ``noise``.

    Raises
    ------
    ValueError
        If the facts do not fit into ``tokens``, or have fewer questions than turns.
    """
    if task not in KINDS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if seed < 0 or hops < 1 or not 1 <= shots < len(lang.CATEGORIES[0]):
        raise ValueError(f"need seed >= 0, hops >= 1, 1 <= shots < 12; got {seed=}, {hops=}, {shots=}")
    kinds = KINDS[task]
    knobs = Knobs(facts=facts, hops=hops, shots=shots, contexts=contexts)
    sections = f"/{contexts}" if "joint-recall" in kinds else ""
    dice = Dice(f"winnow/{task}/{tokens}/{facts}/{hops}/{shots}{sections}/{filler}/{seed}")
    parts = write(dice, kinds, knobs)
    # Every kind gets its share of the turns; those of one more go to the first kinds.
    shares = [turns // len(parts) + (i < turns % len(parts)) for i in range(len(parts))]
    short = [kind for kind, part, n in zip(kinds, parts, shares, strict=True) if n > len(part.asks)]
    if short:
        least = min(len(part.asks) for part in parts)
        raise ValueError(
            f"these {short[0]} facts have {least} questions; ask for at most that many turns of each kind"
        )
    told = _joined(parts)
    room = tokens - 1 - sum(len(line) + 1 for line in told.lines)
    if room < 0:
        raise ValueError(
            f"{len(told.lines)} facts need {tokens - room} tokens; allow more tokens or fewer facts"
        )
    sentences: list[Pieces] = []
    while room > 0:
        sentence = _sentence(dice, filler)
        room -= len(sentence) + 1
        if room >= 0:
            sentences.append(sentence)
    everything = told.lines + sentences
    pieces: list[str] = []
    spans: dict[int, tuple[int, int]] = {}
    at = 0
    for index in _order(dice, told, len(everything)):
        length = sum(map(len, everything[index]))
        spans[index] = (at, at + length)
        at += length + 1
        pieces += (*everything[index], lang.NEWLINE)
    first, asks = 0, list[Ask]()
    for part, share in zip(parts, shares, strict=True):
        asks += dice.sample(told.asks[first : first + len(part.asks)], share)
        first += len(part.asks)
    if len(parts) > 1:
        asks = dice.sample(asks, turns)
    return Document(
        task=task,
        seed=seed,
        text="".join(pieces),
        tokens=len(pieces) + 1,
        turns=tuple(_turn(ask, spans) for ask in asks),
        pieces=tuple(pieces),
    )


def _joined(parts: Sequence[Facts]) -> Facts:
    """Facts of several kinds as one."""
    whole = Facts([], [])
    for part in parts:
        moved = part.shifted(len(whole.lines))
        whole.lines.extend(moved.lines)
        whole.asks.extend(moved.asks)
        whole.headings.extend(moved.headings)
        whole.section.update(moved.section)
    return whole


def _order(dice: Dice, told: Facts, lines: int) -> list[int]:
    """Random places for all lines; headings in turn, each with what belongs under it."""
    order = dice.sample(range(lines), lines)
    if not told.headings:
        return order
    under: dict[int, list[int]] = {heading: [] for heading in told.headings}
    for line in order:
        if line not in under:
            own = told.section.get(line)
            under[dice.pick(told.headings) if own is None else own].append(line)
    return [line for heading, rest in under.items() for line in (heading, *rest)]


def _turn(ask: Ask, spans: dict[int, tuple[int, int]]) -> Turn:
    return Turn(
        question="".join(ask.question).strip(),
        answer="".join(ask.answer).strip(),
        reply="".join(ask.reply).strip(),
        sources=tuple(spans[fact] for fact in ask.facts),
        question_pieces=(lang.QUESTION, *ask.question, lang.ANSWER),
        reply_pieces=(*ask.reply, lang.NEWLINE),
    )


def prompt(document: Document, turn: int, history: Sequence[str] | None = None) -> str:
    """The text up to and with the ``A:`` of one turn.

    Parameters
    ----------
    document : Document
        From `make`.
    turn : int
        Index of the turn to ask.
    history : sequence of str, optional
        What was answered in the turns before; by default their replies as trained.
    """
    replies = [t.reply for t in document.turns[:turn]] if history is None else history
    if len(replies) < turn:
        raise ValueError(f"turn {turn} needs {turn} earlier replies, not {len(replies)}")
    asked = "".join(
        f"Q: {t.question} A: {reply.strip()}\n"
        for t, reply in zip(document.turns[:turn], replies, strict=False)
    )
    return f"{document.text}{asked}Q: {document.turns[turn].question} A:"


def score(turn: Turn, generated: str) -> bool:
    """Exact match of the value: the first line of the output, after its last ``=`` if it has one."""
    line = generated.strip().split("\n", 1)[0]
    return line.rsplit("=", 1)[-1].strip() == turn.answer
