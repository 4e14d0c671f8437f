"""LongBench's scorers (arXiv 2308.14508, THUDM/LongBench ``eval.py`` and ``metrics.py``).

An answer scores as with the best of the right ones.  What is odd stays odd:

``longbench:rouge``
    ROUGE-L of the library ``rouge``: sentences end at any full stop (``3.5`` is two), words are
    compared with case and punctuation, and only *distinct* words are counted.
``longbench:classes``
    The right class is named, divided by how many classes are.  Classes inside the right one's name do
    not count, but of two that follow one another the second does.
``longbench:code``
    Similarity in whole hundredths; without ``python-Levenshtein``, whose presence changes the published one.

Where they differ from the published ones: Chinese is compared by characters instead of the words of a
segmenter, and long sentences score what they should, where the library's recursion ends in 0.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from types import MappingProxyType

from winnow.bench.scbench_scorers import character_f1, common
from winnow.bench.tasks.example import Turn

__all__ = ["LONGBENCH"]

Scorer = Callable[[Turn, str], float]


def question(turn: Turn, answer: str) -> float:
    """F1 over words, without case, punctuation and articles."""

    def bag(text: str) -> Counter[str]:
        bare = "".join(c for c in text.lower() if c not in string.punctuation)
        return Counter(re.sub(r"\b(a|an|the)\b", " ", bare).split())

    def f1(right: str) -> float:
        given, wanted = bag(answer), bag(right)
        same = (given & wanted).total()
        return 2 * same / (given.total() + wanted.total()) if same else 0.0

    return max(f1(right) for right in turn.answers)


def rouge(turn: Turn, answer: str) -> float:
    """ROUGE-L."""
    return max(_rouge(_sentences(answer), _sentences(right)) for right in turn.answers)


def rouge_zh(turn: Turn, answer: str) -> float:
    """ROUGE-L, every character a word."""
    return max(_rouge(_sentences(" ".join(answer)), _sentences(" ".join(right))) for right in turn.answers)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _rouge(given: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """F1 of the distinct words that any two sentences have in common in the same order."""
    ours, theirs = set[str]().union(*given), set[str]().union(*wanted)
    if not ours or not theirs:
        return 0.0
    # Of several longest common subsequences the library finds the one that `common` finds this way round.
    same = {one[index] for one in given for other in wanted for index in common(one, other)}
    precision, recall = len(same) / len(ours), len(same) / len(theirs)
    return 2 * precision * recall / (precision + recall + 1e-8)


def first_line(scorer: Scorer) -> Scorer:
    """The same scorer for what stands before the answer's first line break."""
    return lambda turn, answer: scorer(turn, answer.lstrip("\n").split("\n")[0])


def classes(turn: Turn, answer: str) -> float:
    """The right class is named, divided by how many classes are."""

    def share(right: str) -> float:
        named = [one for one in turn.choices if one in answer]
        for (
            one
        ) in named:  # of a list that shrinks, as published: what follows a class that goes is passed over
            if one in right and one != right:
                named.remove(one)
        return 1 / len(named) if right in named else 0.0

    return max(share(right) for right in turn.answers)


def numbers(turn: Turn, answer: str) -> float:
    """Share of the answer's numbers that are the number of the label (``Paragraph 7``)."""
    given = re.findall(r"\d+", answer)
    wanted = (re.findall(r"\d+", right)[0] for right in turn.answers)
    return max(given.count(one) / len(given) for one in wanted) if given else 0.0


def line(turn: Turn, answer: str) -> float:
    """Similarity of the first line that is neither comment nor fence with the right line."""
    lines = answer.lstrip("\n").split("\n")
    given = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    return max(round(100 * SequenceMatcher(None, given, right).ratio()) / 100 for right in turn.answers)


LONGBENCH: Mapping[str, Scorer] = MappingProxyType(
    {
        "longbench:qa": question,
        "longbench:qa_line": first_line(question),
        "longbench:qa_zh": character_f1,
        "longbench:rouge": rouge,
        "longbench:rouge_line": first_line(rouge),
        "longbench:rouge_zh": rouge_zh,
        "longbench:classes": first_line(classes),
        "longbench:number": numbers,
        "longbench:code": line,
    }
)
