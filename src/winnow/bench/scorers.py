"""Scorers: how right an answer is, from 0 to 1.

A scorer sees one turn and one answer and keeps nothing between calls; an exact match of the golden
answer scores 1 in each of those that the tasks here use (a test holds them to it).  Beside them
`SCORERS` has SCBench's under ``scbench:<task>``, with their faults (`winnow.bench.scbench_scorers`
says which), and LongBench's under ``longbench:<kind>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import SequenceMatcher
from types import MappingProxyType

from winnow.bench.longbench_scorers import LONGBENCH
from winnow.bench.scbench_scorers import SCBENCH
from winnow.bench.tasks.example import Turn

__all__ = ["SCORERS", "Scorer", "similarity"]

#: from a turn and a model's answer to a score in 0..1
Scorer = Callable[[Turn, str], float]

LETTERS = "ABCDEFGHIJ"
#: 999 of 1 000 pairs of functions of the corpus are less similar (the median is 0.19)
UNRELATED = 0.5


def _first_line(answer: str) -> str:
    return answer.strip().split("\n", 1)[0].strip()


def _holds(text: str, wanted: str) -> bool:
    """Whether ``wanted`` stands in the text as a whole: no letter, digit or hyphen of ASCII touches it.

    Only ASCII counts as touching, since Chinese writes no spaces between words.
    """
    return re.search(rf"(?<![A-Za-z0-9_-]){re.escape(wanted)}(?![A-Za-z0-9_]|-\w)", text) is not None


def value(turn: Turn, answer: str) -> float:
    """The first line of the answer, after its last ``=`` if it has one, is one of the answers' values."""
    given = _first_line(answer).rsplit("=", 1)[-1].strip()
    return float(given in {right.rsplit("=", 1)[-1].strip() for right in turn.answers})


def string(turn: Turn, answer: str) -> float:
    """One of the answers stands in the given one, as a whole and letter by letter."""
    return float(any(_holds(answer, right) for right in turn.answers))


def phrase(turn: Turn, answer: str) -> float:
    """As `string`, whatever the case and the spaces."""
    given = " ".join(answer.lower().split())
    return float(any(_holds(given, " ".join(right.lower().split())) for right in turn.answers))


def label(turn: Turn, answer: str) -> float:
    """The first line is one of the answers, whatever its case, quotes and full stop."""
    given = _first_line(answer).strip(" \"'`*.").lower()
    return float(given in {right.lower() for right in turn.answers})


def members(turn: Turn, answer: str) -> float:
    """F1 between the set ``answers[1:]`` and the words of the answer that look like its members.

    A word looks like one if it has as many characters, all in upper case.
    """
    wanted = set(turn.answers[1:])
    sizes = {len(member) for member in wanted}
    given = {word for word in re.findall(r"\w+", answer) if word.isupper() and len(word) in sizes}
    return 2 * len(wanted & given) / (len(wanted) + len(given))


def number(turn: Turn, answer: str) -> float:
    """The first number of the first line is the answer; ordinals (``2nd``) are no numbers.

    Signs and separators of thousands (``-1,234``) are understood, ``7.0`` equals ``7``.
    """
    pattern = r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w,]*\d|[A-Za-z])"
    found = re.search(pattern, _first_line(answer))
    if found is None:
        return 0.0
    given = float(found[0].replace(",", ""))
    return float(any(given == float(right) for right in turn.answers))


def choice(turn: Turn, answer: str) -> float:
    """The letter of the right choice, or its text; ``answers`` are the letter and the text.

    A letter counts only where it stands alone ("B", "(B)", "B.", "The answer is B"), never as the
    start of a word; the text of the right choice counts if no other choice's text is there.
    """
    line = _first_line(answer)
    letters = LETTERS[: len(turn.choices)]
    alone = re.match(rf"\(?([{letters}])(?:[).:,]|$|\s*-)", line) or re.search(
        rf"(?:answer|choice|option)(?: is)?:? *\(?([{letters}])(?![\w])", line, re.IGNORECASE
    )
    if alone is not None:
        return float(alone[1].upper() == turn.answers[0])
    named = [text for text in turn.choices if _holds(line.lower(), text.lower())]
    return float(named == [turn.answers[1]])


def facts(turn: Turn, answer: str) -> float:
    """Share of the facts (``answers[1:]``) that the answer holds, each as a whole."""
    given = re.sub(r"(?<=\d),(?=\d{3})", "", " ".join(answer.lower().split()))
    wanted = turn.answers[1:]
    return sum(_holds(given, fact.lower()) for fact in wanted) / len(wanted)


def code(turn: Turn, answer: str) -> float:
    """Similarity of the answer's first code block to the function, 0 below what any two share."""
    ratio = similarity(answer, turn.answers[0])
    return ratio if ratio >= UNRELATED else 0.0


def similarity(left: str, right: str) -> float:
    """How much of their tokens two sources share, in order.

    Twice the matching tokens over all tokens (difflib's ratio), without comments, triple-quoted
    strings and layout; 1 for sources that differ only in these.  A fenced block is taken out of the
    text around it.
    """
    return SequenceMatcher(None, _tokens(left), _tokens(right), autojunk=False).ratio()


def _tokens(text: str) -> list[str]:
    fenced = re.search(r"```[\w+-]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    source = fenced[1] if fenced else text
    strings = r"[rbfRBF]{0,2}(?:\"\"\".*?\"\"\"|'''.*?'''|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*')"
    found = re.findall(rf"#[^\n]*|{strings}|\w+|[^\w\s]", source, re.DOTALL)
    return [token for token in found if not token.startswith(("#", '"""', "'''", 'r"""'))]


SCORERS: MappingProxyType[str, Scorer] = MappingProxyType(
    {
        "value": value,
        "string": string,
        "phrase": phrase,
        "label": label,
        "set": members,
        "number": number,
        "choice": choice,
        "facts": facts,
        "code": code,
        **SCBENCH,
        **LONGBENCH,
    }
)
