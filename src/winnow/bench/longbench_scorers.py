"""LongBench's scorers (arXiv 2308.14508, THUDM/LongBench ``metrics.py``), the best over the answers.

Where they differ from the published ones: Chinese is compared by characters instead of the words of
a segmenter, also in summaries; ROUGE-L is the plain F1 of the longest common subsequence; one class
named inside the name of another is passed over whatever their order.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from types import MappingProxyType

from winnow.bench.scbench_scorers import character_f1, rouge_lsum
from winnow.bench.tasks.example import Turn

__all__ = ["LONGBENCH"]


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
    """ROUGE-L over the whole texts."""
    flat = answer.replace("\n", " ")
    return max(rouge_lsum(flat, right.replace("\n", " ")) for right in turn.answers)


def classes(turn: Turn, answer: str) -> float:
    """The right class is named, divided by how many classes are."""
    line = answer.lstrip("\n").split("\n")[0]
    named = [one for one in turn.choices if one in line]

    def share(right: str) -> float:
        kept = [one for one in named if one == right or one not in right]
        return 1 / len(kept) if right in kept else 0.0

    return max(share(right) for right in turn.answers)


def numbers(turn: Turn, answer: str) -> float:
    """Share of the answer's numbers that are the number of the label (``Paragraph 7``)."""
    given = re.findall(r"\d+", answer)
    wanted = {re.findall(r"\d+", right)[0] for right in turn.answers}
    return sum(one in wanted for one in given) / len(given) if given else 0.0


def line(turn: Turn, answer: str) -> float:
    """Similarity of the first line that is neither comment nor fence with the right line."""
    lines = answer.lstrip("\n").split("\n")
    given = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    return max(SequenceMatcher(None, given, right).ratio() for right in turn.answers)


LONGBENCH: Mapping[str, Callable[[Turn, str], float]] = MappingProxyType(
    {
        "longbench:qa": question,
        "longbench:qa_zh": character_f1,
        "longbench:rouge": rouge,
        "longbench:classes": classes,
        "longbench:number": numbers,
        "longbench:code": line,
    }
)
