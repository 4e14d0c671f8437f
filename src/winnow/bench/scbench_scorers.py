"""SCBench's published scorers (arXiv 2412.10319; microsoft/MInference, ``scbench/compute_scores.py``).

Rebuilt from their behaviour, for comparison with published figures.  What is wrong with them stays
wrong here, and is what the scorers of `winnow.bench.scorers` correct:

``scbench:kv``, ``scbench:prefix_suffix``
    The label anywhere in the answer, also inside a longer string.
``scbench:vt``
    Share of the labels found, rounded to two digits, also inside longer words.
``scbench:qa_eng``, ``scbench:many_shot``
    1 if any label occurs anywhere.  SCBench's many-shot labels are plain strings, over whose
    *characters* the published loop runs: nearly every answer scores 1.
``scbench:choice_eng``
    Any answer that starts with A, B, C or D is read as that letter, so the exact text of the right
    choice scores 0 if it starts with another of these letters.
``scbench:qa_chn``
    F1 over characters, the best of the labels.
``scbench:mf``
    The first digits of the answer: "the 2nd largest is 98" reads as 2; signs are lost.  Decimals are
    cut off where the label is an integer.
``scbench:passkey``
    The first run of digits equals the label.
``scbench:summary``
    ROUGE-Lsum (F1, no stemming) with the reference summary.
``scbench:repoqa``
    1 if sentence BLEU (words split at spaces, smoothing method 4) with the right function is at
    least 0.8 and higher than with every other function asked for about the same repository.  So an
    example's score depends on which other examples are in the run; here the other functions are the
    turn's ``choices``, nothing is kept.  An exact match of fewer than four words scores 0; so does a
    right answer whose code block begins with another function.  See `winnow.bench.repoqa_scorer`.

The loops of vt, many_shot and qa_chn run over the *characters* of a label that is a plain string.  A
turn has such a label where it has one answer; of a list, ``answers[1:]`` are the members.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from winnow.bench.repoqa_scorer import REPOQA
from winnow.bench.tasks.example import Turn

__all__ = ["SCBENCH", "character_f1", "common", "rouge_lsum"]

#: punctuation of both scripts that the published character F1 leaves out
MARKS = string.punctuation + (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗"  # noqa: RUF001
    "〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def contains(turn: Turn, answer: str) -> float:
    """The label is a substring of the answer."""
    return float(turn.answers[0] in answer)


def _labels(turn: Turn) -> Sequence[str]:
    """What the published loops run over: the members of a list, or the characters of a plain string."""
    return turn.answers[1:] or turn.answers[0]


def share(turn: Turn, answer: str) -> float:
    """Share of the labels that are substrings."""
    labels = _labels(turn)
    return round(sum(label.lower() in answer.lower() for label in labels) / len(labels), 2)


def any_of(turn: Turn, answer: str) -> float:
    """Any answer is a substring."""
    return float(any(label.upper() in answer.strip().upper() for label in turn.answers))


def any_label(turn: Turn, answer: str) -> float:
    """Any label is a substring."""
    return float(any(label.upper() in answer.strip().upper() for label in _labels(turn)))


def first_letter(turn: Turn, answer: str) -> float:
    """The first letter of the answer decides; ``answers`` are the letter and the text."""
    given = answer.strip()
    if not given:
        return 0.0
    if given[0] in "ABCD":
        return float(given[0] in turn.answers)
    if given in turn.answers:
        return 1.0
    given = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", given))
    for opening in ("answer is:", "answer:", "answer is", "option is"):
        at = given.find(opening)
        if at >= 0:
            rest = given[at + len(opening) + 1 :]
            return float(any(rest.startswith(label) for label in turn.answers)) if rest else 0.0
    letter = next((word for word in given.split() if word in "ABCD"), None)
    return float(letter in turn.answers)


def character_f1(turn: Turn, answer: str) -> float:
    """F1 over characters without punctuation and spaces; the best of the answers."""
    return max(_character_f1(label, answer) for label in turn.answers)


def label_f1(turn: Turn, answer: str) -> float:
    """The same, the best of the labels."""
    return max(_character_f1(label, answer) for label in _labels(turn))


def _character_f1(label: str, answer: str) -> float:
    given, wanted = (
        Counter(c for c in text.lower() if c not in MARKS and not c.isspace()) for text in (answer, label)
    )
    same = (given & wanted).total()
    return 2 * same / (given.total() + wanted.total()) if same else 0.0


def first_number(turn: Turn, answer: str) -> float:
    """The first digits (with decimals) equal the label; an integer by what stands before the point."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    if found is None:
        return 0.0
    given, label = float(found[0]), turn.answers[0]
    return float((given if "." in label else given // 1) == float(label))


def first_digits(turn: Turn, answer: str) -> float:
    """The first run of digits equals the label."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found[0] == turn.answers[0])


def summary(turn: Turn, answer: str) -> float:
    """ROUGE-Lsum with the golden answer."""
    return rouge_lsum(answer, turn.answers[0])


def rouge_lsum(given: str, wanted: str) -> float:
    """ROUGE-Lsum (Lin 2004, section 3.2): F1 of the union of common subsequences, line by line."""
    ours = [_words(line) for line in given.split("\n") if _words(line)]
    theirs = [_words(line) for line in wanted.split("\n") if _words(line)]
    total_ours, total_theirs = sum(map(len, ours)), sum(map(len, theirs))
    if not total_ours or not total_theirs:
        return 0.0
    left = Counter(word for line in ours for word in line)
    hits = 0
    for line in theirs:
        # A word counts once per place in the reference, and not more often than it was given.
        for index in sorted(set().union(*(common(line, other) for other in ours))):
            if left[line[index]] > 0:
                left[line[index]] -= 1
                hits += 1
    return 2 * hits / (total_ours + total_theirs)


def _words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def common(line: Sequence[str], other: Sequence[str]) -> set[int]:
    """Indices of ``line`` that are part of one longest common subsequence with ``other``."""
    table = [[0] * (len(other) + 1) for _ in range(len(line) + 1)]
    for i, word in enumerate(line):
        for j, second in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if word == second else max(table[i][j + 1], table[i + 1][j])
    found: set[int] = set()
    i, j = len(line), len(other)
    while i and j:
        if line[i - 1] == other[j - 1]:
            found.add(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return found


SCBENCH: Mapping[str, Callable[[Turn, str], float]] = MappingProxyType(
    {
        "scbench:kv": contains,
        "scbench:prefix_suffix": contains,
        "scbench:vt": share,
        "scbench:qa_eng": any_of,
        "scbench:qa_chn": label_f1,
        "scbench:choice_eng": first_letter,
        "scbench:mf": first_number,
        "scbench:passkey": first_digits,
        "scbench:many_shot": any_label,
        "scbench:summary": summary,
        **REPOQA,
    }
)
