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
``mixed``      some of each
=============  ==================================  =========================  =============

The model answers a variable with its chain, ``bako = 48-21``; only the last value counts.
In ``labels`` the noun asked for is never one of the examples: its category decides.

The same arguments give the same bytes on every machine and Python (`Dice`).  Seeds in
`HELD_OUT` are for evaluation, demonstration and benchmarks; training refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from winnow.models.embedded import language as lang
from winnow.models.embedded.dice import Dice

__all__ = ["HELD_OUT", "TASKS", "Document", "Turn", "make", "prompt", "score"]

Task = Literal["key-value", "needles", "variables", "labels", "mixed"]
Filler = Literal["sentences", "words", "noise"]
Pieces = tuple[str, ...]

TASKS: tuple[Task, ...] = ("key-value", "needles", "variables", "labels", "mixed")
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


@dataclass(frozen=True)
class _Ask:
    """A turn before its facts have found their places: ``facts`` are indices into the fact lines."""

    question: Pieces
    reply: Pieces
    answer: Pieces
    facts: tuple[int, ...]


def _names(dice: Dice, n: int) -> list[Pieces]:
    """``n`` different names; two of them may share a syllable.  None spells a word of the language."""
    words, found = set(lang.vocabulary()), dict[Pieces, None]()
    while len(found) < n:
        name = (dice.pick(lang.FIRST_SYLLABLES), dice.pick(lang.SECOND_SYLLABLES))
        if "".join(name) not in words:
            found[name] = None
    return list(found)


def _values(dice: Dice, n: int) -> list[Pieces]:
    """``n`` values, their first numbers all different as long as there are enough of them."""
    firsts: list[str] = []
    while len(firsts) < n:
        firsts += dice.sample(lang.FIRST_NUMBERS, min(n - len(firsts), len(lang.FIRST_NUMBERS)))
    return [(first, dice.pick(lang.SECOND_NUMBERS)) for first in firsts]


Facts = tuple[list[Pieces], list[_Ask]]


def _key_value(names: list[Pieces], values: list[Pieces]) -> Facts:
    lines = [(lang.KEY, *name, lang.ARROW, *value) for name, value in zip(names, values, strict=True)]
    asks = [_Ask((" key", *names[i]), values[i], values[i], (i,)) for i in range(len(names))]
    return lines, asks


def _needles(names: list[Pieces], values: list[Pieces]) -> Facts:
    lines = [
        (lang.THE, lang.CODE, lang.OF, *name, lang.IS, *value, lang.STOP)
        for name, value in zip(names, values, strict=True)
    ]
    start = (" the", lang.CODE, lang.OF)
    return lines, [_Ask((*start, *names[i]), values[i], values[i], (i,)) for i in range(len(names))]


def _variables(names: list[Pieces], values: list[Pieces], hops: int) -> Facts:
    """Chains of ``hops`` links and an assignment; the names left over are assigned directly."""
    lines: list[Pieces] = []
    asks: list[_Ask] = []
    for start in range(0, len(names) - hops, hops + 1):
        stop = start + hops + 1
        chain, value = names[start:stop], values[start]
        for left, right in zip(chain, [*chain[1:], value], strict=True):
            lines.append((lang.SET, *left, lang.EQUALS, *right))
        reply = tuple(piece for name in chain[1:] for piece in (*name, lang.EQUALS)) + value
        asks.append(_Ask((" set", *chain[0]), reply, value, tuple(range(start, stop))))
    for name, value in zip(names[len(lines) :], values[len(lines) :], strict=True):
        lines.append((lang.SET, *name, lang.EQUALS, *value))
    return lines, asks


def _labels(dice: Dice, shots: int) -> Facts:
    """Every category with ``shots`` examples of its label; questions about its other nouns."""
    lines: list[Pieces] = []
    asks: list[_Ask] = []
    labels = dice.sample(lang.LABELS, len(lang.CATEGORIES))
    for nouns, label in zip(lang.CATEGORIES, labels, strict=True):
        shuffled = dice.sample(nouns, len(nouns))
        examples = tuple(range(len(lines), len(lines) + shots))
        lines += [(lang.LABEL, noun, lang.COLON, label) for noun in shuffled[:shots]]
        asks += [_Ask((" label", noun), (label,), (label,), examples) for noun in shuffled[shots:]]
    return lines, asks


def _facts(dice: Dice, task: Task, facts: int, hops: int, shots: int) -> Facts:
    if task == "labels":
        return _labels(dice, shots)
    names, values = _names(dice, facts), _values(dice, facts)
    if task == "key-value":
        return _key_value(names, values)
    if task == "needles":
        return _needles(names, values)
    if task == "variables":
        return _variables(names, values, hops)
    third = facts // 3
    lines, asks = _labels(dice, shots)
    for new_lines, new_asks in (
        _key_value(names[:third], values[:third]),
        _needles(names[third : 2 * third], values[third : 2 * third]),
        _variables(names[2 * third :], values[2 * third :], hops),
    ):
        shift = len(lines)
        lines += new_lines
        asks += [_Ask(a.question, a.reply, a.answer, tuple(f + shift for f in a.facts)) for a in new_asks]
    return lines, asks


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


#: what random lines of words are made of: every word but the separators and single characters
_WORDS = tuple(
    piece
    for piece in lang.vocabulary()
    if len(piece) > 1 and piece not in lang.SPECIAL + lang.BYTES + lang.SEPARATORS + (lang.QUESTION,)
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
        Lines of facts; a chain of variables takes ``hops + 1`` of them.  ``labels`` ignores it
        (8 categories times ``shots``), ``mixed`` adds the labels to it.
    hops : int
        Links from the variable asked for to the one that has a value.
    shots : int
        Examples of each label.
    filler : str
        ``sentences``, or harsher ones for training and stress: ``words``, ``noise``.

    Raises
    ------
    ValueError
        If the facts do not fit into ``tokens``, or there are fewer facts than turns.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if seed < 0 or hops < 1 or not 1 <= shots < len(lang.CATEGORIES[0]):
        raise ValueError(f"need seed >= 0, hops >= 1, 1 <= shots < 12; got {seed=}, {hops=}, {shots=}")
    dice = Dice(f"winnow/{task}/{tokens}/{facts}/{hops}/{shots}/{filler}/{seed}")
    lines, asks = _facts(dice, task, facts, hops, shots)
    if turns > len(asks):
        raise ValueError(f"these {task} facts have {len(asks)} questions; ask for at most that many turns")
    room = tokens - 1 - sum(len(line) + 1 for line in lines)
    if room < 0:
        raise ValueError(f"{len(lines)} facts need {tokens - room} tokens; allow more tokens or fewer facts")
    sentences: list[Pieces] = []
    while room > 0:
        sentence = _sentence(dice, filler)
        room -= len(sentence) + 1
        if room >= 0:
            sentences.append(sentence)
    # Facts take random places among all lines and stand there in random order.
    order = dice.sample(range(len(lines) + len(sentences)), len(lines) + len(sentences))
    everything = lines + sentences
    pieces: list[str] = []
    spans: dict[int, tuple[int, int]] = {}
    at = 0
    for index in order:
        length = sum(map(len, everything[index]))
        spans[index] = (at, at + length)
        at += length + 1
        pieces += (*everything[index], lang.NEWLINE)
    return Document(
        task=task,
        seed=seed,
        text="".join(pieces),
        tokens=len(pieces) + 1,
        turns=tuple(_turn(ask, spans) for ask in dice.sample(asks, turns)),
        pieces=tuple(pieces),
    )


def _turn(ask: _Ask, spans: dict[int, tuple[int, int]]) -> Turn:
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
