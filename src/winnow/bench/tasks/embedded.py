"""The embedded form: documents in the embedded model's vocabulary, wrapped as examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from winnow.bench.tasks.example import Example, Join, Turn
from winnow.bench.tasks.task import Draft, Maker, Request
from winnow.models.embedded import documents
from winnow.models.embedded import language as lang

__all__ = ["JOIN", "read_document", "wrap"]

#: as in `winnow.models.embedded.documents.prompt`
JOIN = Join(opening="{context}", question="Q: {question} A:", answer=" {answer}\n")


def wrap(task: documents.Task) -> Maker:
    """A maker of one kind of document.

    The documents' seeds are ``1000 * seed + number``: all of them held out from training.
    ``count`` is not asked: the language counts its own pieces.
    """

    def write(request: Request) -> Draft:
        seed = 1000 * request.seed + request.number
        assert seed in documents.HELD_OUT
        knobs = request.knobs
        document = documents.make(
            task,
            tokens=request.length,
            seed=seed,
            turns=request.turns,
            facts=knobs.get("facts", 32),
            hops=knobs.get("hops", 1),
            shots=knobs.get("shots", 1),
            contexts=knobs.get("contexts", 4),
        )
        turns = tuple(
            Turn(
                question=turn.question,
                # The reply may show its working ("bako = 48-21"); the scorer compares the value.
                answers=(turn.reply,) if turn.reply == turn.answer else (turn.reply, turn.answer),
                scorer="value",
                max_new_tokens=len(turn.reply_pieces) + 2,
                depth=turn.sources[-1][0] / len(document.text),
            )
            for turn in document.turns
        )
        return Draft(context=document.text, turns=turns, join=JOIN)

    return write


def _find(pattern: str, text: str) -> str:
    """The one group of the one line that matches."""
    (found,) = re.findall(rf"^{pattern}$", text, re.MULTILINE)
    return str(found)


def _key(context: str, name: str) -> str:
    return _find(rf"key {name} -> (.+)", context)


def _code(context: str, name: str) -> str:
    return _find(rf"The code of {name} is (.+)\.", context)


def _variable(context: str, name: str) -> str:
    value = name
    while not value[0].isdigit():
        value = _find(rf"set {value} = (.+)", context)
    return value


def _label(context: str, noun: str) -> str:
    (nouns,) = (nouns for nouns in lang.CATEGORIES if f" {noun}" in nouns)
    told = "|".join(other.strip() for other in nouns)
    (label,) = set(re.findall(rf"^label (?:{told}) : (.+)$", context, re.MULTILINE))
    return str(label)


def _string(context: str, ends: str) -> str:
    first, last = ends.split("...")
    return _find(rf"string ({first}\S+{last})", context)


def _extreme(best: Callable[[Iterable[int]], int]) -> Callable[[str, str], str]:
    return lambda context, series: str(
        best(map(int, re.findall(rf"^{series} (\d+)$", context, re.MULTILINE)))
    )


def _within(context: str, asked: str) -> str:
    name, key = asked.split(" key ")
    _, section = f"\n{context}".split(f"\ncontext {name}\n")
    section, *_ = section.split("\ncontext ")
    return _key(section, key)


#: opening of a question, and how the rest is answered from the context
READERS: dict[str, Callable[[str, str], str]] = {
    "key ": _key,
    "the code of ": _code,
    "set ": _variable,
    "label ": _label,
    "string ": _string,
    "largest ": _extreme(max),
    "smallest ": _extreme(min),
    "context ": _within,
}


def read_document(example: Example, turn: Turn) -> str:
    """Find the lines that the question is about."""
    for opening, reader in READERS.items():
        if turn.question.startswith(opening):
            return reader(example.context, turn.question.removeprefix(opening))
    raise AssertionError(f"no rule for the question {turn.question!r}")
