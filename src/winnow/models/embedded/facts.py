"""The facts that the embedded model is asked about: one writer for each task of `documents`.

A writer draws from the dice and returns `Facts`: the lines that state them, in no particular
order, and a question about each.  Where a line's meaning depends on a heading above it, the
facts say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from winnow.models.embedded import language as lang
from winnow.models.embedded.dice import Dice

__all__ = ["Ask", "Facts", "Kind", "Knobs", "Pieces", "write"]

Pieces = tuple[str, ...]


@dataclass(frozen=True)
class Ask:
    """A turn before its facts have found their places: ``facts`` are indices into the lines."""

    question: Pieces
    reply: Pieces
    answer: Pieces
    facts: tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """Lines and the questions about them.

    ``headings`` are indices of lines that open a section each, ``section`` gives the heading under
    which a line has to stand; a line that is in neither may stand anywhere.
    """

    lines: list[Pieces]
    asks: list[Ask]
    headings: list[int] = field(default_factory=list)
    section: dict[int, int] = field(default_factory=dict)

    def shifted(self, by: int) -> Facts:
        """The same facts, with ``by`` lines of others before them."""
        return Facts(
            self.lines,
            [Ask(a.question, a.reply, a.answer, tuple(f + by for f in a.facts)) for a in self.asks],
            [line + by for line in self.headings],
            {line + by: heading + by for line, heading in self.section.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """How many lines, and how hard: the arguments of `documents.make` of the same names."""

    facts: int
    hops: int
    shots: int
    contexts: int


def names(dice: Dice, n: int) -> list[Pieces]:
    """``n`` different names; two of them may share a syllable.  None spells a word of the language."""
    words, found = set(lang.vocabulary()), dict[Pieces, None]()
    while len(found) < n:
        name = (dice.pick(lang.FIRST_SYLLABLES), dice.pick(lang.SECOND_SYLLABLES))
        if "".join(name) not in words:
            found[name] = None
    return list(found)


def different(dice: Dice, items: Sequence[str], n: int) -> list[str]:
    """``n`` items, all different as long as there are enough of them."""
    found: list[str] = []
    while len(found) < n:
        found += dice.sample(items, min(n - len(found), len(items)))
    return found


def values(dice: Dice, n: int) -> list[Pieces]:
    """``n`` values, their first numbers all different as long as there are enough of them."""
    return [(first, dice.pick(lang.SECOND_NUMBERS)) for first in different(dice, lang.FIRST_NUMBERS, n)]


def key_value(called: list[Pieces], told: list[Pieces]) -> Facts:
    """A line ``key bako -> 48-21`` for each name and its value."""
    lines = [(lang.KEY, *name, lang.ARROW, *value) for name, value in zip(called, told, strict=True)]
    return Facts(lines, [Ask((" key", *called[i]), told[i], told[i], (i,)) for i in range(len(called))])


def needles(called: list[Pieces], told: list[Pieces]) -> Facts:
    """A sentence ``The code of bako is 48-21.`` for each name and its value."""
    lines = [
        (lang.THE, lang.CODE, lang.OF, *name, lang.IS, *value, lang.STOP)
        for name, value in zip(called, told, strict=True)
    ]
    start = (" the", lang.CODE, lang.OF)
    return Facts(lines, [Ask((*start, *called[i]), told[i], told[i], (i,)) for i in range(len(called))])


def variables(called: list[Pieces], told: list[Pieces], hops: int) -> Facts:
    """Chains of ``hops`` links and an assignment; the names left over are assigned directly."""
    lines: list[Pieces] = []
    asks: list[Ask] = []
    for start in range(0, len(called) - hops, hops + 1):
        stop = start + hops + 1
        chain, value = called[start:stop], told[start]
        for left, right in zip(chain, [*chain[1:], value], strict=True):
            lines.append((lang.SET, *left, lang.EQUALS, *right))
        reply = tuple(piece for name in chain[1:] for piece in (*name, lang.EQUALS)) + value
        asks.append(Ask((" set", *chain[0]), reply, value, tuple(range(start, stop))))
    for name, value in zip(called[len(lines) :], told[len(lines) :], strict=True):
        lines.append((lang.SET, *name, lang.EQUALS, *value))
    return Facts(lines, asks)


def labels(dice: Dice, shots: int) -> Facts:
    """Every category with ``shots`` examples of its label; questions about its other nouns."""
    lines: list[Pieces] = []
    asks: list[Ask] = []
    drawn = dice.sample(lang.LABELS, len(lang.CATEGORIES))
    for nouns, label in zip(lang.CATEGORIES, drawn, strict=True):
        shuffled = dice.sample(nouns, len(nouns))
        examples = tuple(range(len(lines), len(lines) + shots))
        lines += [(lang.LABEL, noun, lang.COLON, label) for noun in shuffled[:shots]]
        asks += [Ask((" label", noun), (label,), (label,), examples) for noun in shuffled[shots:]]
    return Facts(lines, asks)


def strings(dice: Dice, n: int) -> Facts:
    """``n`` strings such as ``badimu-48``, asked for by their first syllable and their number.

    Four strings or so share each beginning, and four each ending, but no two share both.  What
    follows the beginning differs in all of them, as long as there are enough syllables.
    """
    words = set(lang.vocabulary())
    pool = next(p for p in range(2, n + 3) if p * max(p, 4) >= n and p * p >= n)
    starts, ends = different(dice, lang.FIRST_SYLLABLES, pool), different(dice, lang.SECOND_NUMBERS, pool)
    lines: list[Pieces] = []
    asks: list[Ask] = []
    left: list[str] = []
    for i in range(n):
        start, end = starts[i % pool], ends[(i % pool + i // pool) % pool]
        if not left:
            left = dice.sample(lang.SECOND_SYLLABLES, len(lang.SECOND_SYLLABLES))
        second = next((syllable for syllable in left if start + syllable not in words), left[0])
        left.remove(second)
        thirds = [syllable for syllable in lang.SECOND_SYLLABLES if start + second + syllable not in words]
        string = (start, second, dice.pick(thirds), end)
        lines.append((lang.STRING, *string))
        asks.append(Ask((lang.SPACED_STRING, start, lang.DOTS, end), string, string, (i,)))
    return Facts(lines, asks)


def extrema(dice: Dice, n: int) -> Facts:
    """``n`` lines ``level 48``, shared out to up to four series; the largest and the smallest of each.

    Each series lies within 30 to 60 neighbouring numbers, so that guessing 99 and 10 does not pay.
    """
    numbers, kinds = len(lang.FIRST_NUMBERS), min(len(lang.SERIES), n // 2)
    most = -(-n // kinds) if kinds else 0
    if not 0 < most <= numbers:
        raise ValueError(f"extrema take 2 to {numbers * len(lang.SERIES)} facts, not {n}; change facts")
    lines: list[Pieces] = []
    asks: list[Ask] = []
    for number, series in enumerate(lang.SERIES[:kinds]):
        count = n // kinds + (number < n % kinds)
        span = max(count, 30 + dice.below(31))
        low = dice.below(numbers - span + 1)
        drawn = [low + i for i in dice.sample(range(span), count)]
        for word, extreme in ((lang.LARGEST, max(drawn)), (lang.SMALLEST, min(drawn))):
            value = (lang.FIRST_NUMBERS[extreme],)
            fact = len(lines) + drawn.index(extreme)
            asks.append(Ask((word, f" {series}"), value, value, (fact,)))
        lines += [(series, lang.FIRST_NUMBERS[i]) for i in drawn]
    return Facts(lines, asks)


def joint_recall(dice: Dice, keys: list[Pieces], told: list[Pieces], contexts: int) -> Facts:
    """Every key has a value of its own under each of the ``contexts`` headings ``context attic``."""
    opened = dice.sample(lang.CONTEXTS, contexts)
    lines: list[Pieces] = [(lang.CONTEXT, context) for context in opened]
    facts = Facts(lines, [], headings=list(range(contexts)))
    for heading, context in enumerate(opened):
        for key in keys:
            line, value = len(lines), told[len(facts.asks)]
            lines.append((lang.KEY, *key, lang.ARROW, *value))
            facts.section[line] = heading
            asked = (lang.SPACED_CONTEXT, context, " key", *key)
            facts.asks.append(Ask(asked, value, value, (heading, line)))
    return facts


Kind = Literal["key-value", "needles", "variables", "labels", "prefix-suffix", "extrema", "joint-recall"]
#: facts whose lines begin with a name and end with a value; in one document all names and values differ
NAMED: tuple[Kind, ...] = ("key-value", "needles", "variables", "joint-recall")


def write(dice: Dice, kinds: Sequence[Kind], knobs: Knobs) -> list[Facts]:
    """The facts of each kind, which share ``knobs.facts`` evenly; labels go without a share."""
    counted: list[Kind] = [kind for kind in kinds if kind != "labels"]
    shares: dict[Kind, int] = {kind: knobs.facts // len(counted) for kind in counted}
    if counted:
        shares[counted[-1]] += knobs.facts % len(counted)
    if "joint-recall" in shares and not 2 <= knobs.contexts <= min(
        len(lang.CONTEXTS), shares["joint-recall"]
    ):
        raise ValueError(
            f"joint recall takes 2 to {len(lang.CONTEXTS)} contexts, and a fact for each of them;"
            f" got contexts={knobs.contexts}, facts={knobs.facts}"
        )
    keys = {kind: shares[kind] for kind in kinds if kind in NAMED}
    if "joint-recall" in keys:
        keys["joint-recall"] //= knobs.contexts
    called = iter(names(dice, sum(keys.values())))
    told = iter(values(dice, sum(shares[kind] for kind in keys)))

    def one(kind: Kind) -> Facts:
        if kind == "labels":
            return labels(dice, knobs.shots)
        share = shares[kind]
        if kind == "prefix-suffix":
            return strings(dice, share)
        if kind == "extrema":
            return extrema(dice, share)
        mine, meant = list(islice(called, keys[kind])), list(islice(told, share))
        if kind == "joint-recall":
            return joint_recall(dice, mine, meant, knobs.contexts)
        if kind == "variables":
            return variables(mine, meant, knobs.hops)
        return (key_value if kind == "key-value" else needles)(mine, meant)

    return [one(kind) for kind in kinds]
