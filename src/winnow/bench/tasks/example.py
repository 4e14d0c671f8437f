"""What a task hands to the harness: an example is a context and turns that ask about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["PLAIN", "Category", "Example", "Form", "Join", "Turn", "prompt"]

Category = Literal["string", "semantic", "global", "multi-task"]
Form = Literal["text", "embedded"]


@dataclass(frozen=True, kw_only=True)
class Join:
    """How an example becomes text: opening, then question and answer of every turn.

    Strings are joined as they are; ``{context}``, ``{question}`` and ``{answer}`` are the only
    places that are filled in, each once, and braces elsewhere stay what they are.

    Attributes
    ----------
    opening, question, answer : str
        What surrounds the context, a question and a finished answer.  The answer stands between a
        question and the next one; a model's answer is generated right after the question.
    """

    opening: str = "{context}"
    question: str = "\n\nQuestion: {question}\nAnswer:"
    answer: str = " {answer}"

    def open(self, context: str) -> str:
        """What every turn shares: the text that a prefill may compute once."""
        return self.opening.replace("{context}", context, 1)

    def ask(self, question: str) -> str:
        """What one turn adds before the model answers."""
        return self.question.replace("{question}", question, 1)

    def reply(self, answer: str) -> str:
        """What stands for an earlier turn's answer."""
        return self.answer.replace("{answer}", answer.strip(), 1)


PLAIN = Join()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question about an example's context.

    Attributes
    ----------
    question : str
        The bare question; `Join.ask` puts it into words.
    answers : tuple of str
        What counts as right; the first is the golden answer, which later turns see.  What the
        others are is the scorer's to say (other spellings, facts, members of a set).
    scorer : str
        Key of `winnow.bench.scorers.SCORERS`.
    max_new_tokens : int
        Most tokens that an answer may take.
    depth : float or None
        Where in the context the answer lies, 0 (start) to 1 (end); None if everywhere.
    choices : tuple of str
        Of a multiple choice, in the order of their letters.
    """

    question: str
    answers: tuple[str, ...]
    scorer: str
    max_new_tokens: int
    depth: float | None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context, the turns that ask about it, and what it was made from.

    Attributes
    ----------
    task : str
        Key of `winnow.bench.tasks.TASKS`, or the published name (``scbench:scbench_kv``).
    category : str
        ``string``, ``semantic``, ``global`` or ``multi-task``.
    form : str
        ``text`` for any model, ``embedded`` for the embedded model's vocabulary.
    length : int
        Tokens asked for, of `opening`, in the tokens of the ``count`` it was made with.
    seed, number : int
        The seed of a run and the example's number in it.
    context : str
        Without instruction and questions.
    turns : tuple of Turn
        In the order in which they are asked.
    join : Join
        How context, questions and answers become one text.
    """

    task: str
    category: Category
    form: Form
    length: int
    seed: int
    number: int
    context: str
    turns: tuple[Turn, ...]
    join: Join = PLAIN

    @property
    def opening(self) -> str:
        """The text that all turns share."""
        return self.join.open(self.context)

    @property
    def checksum(self) -> str:
        """SHA-256 (hexadecimal) of the example as canonical JSON: sorted keys, ASCII, no spaces."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


def prompt(example: Example, turn: int, history: Sequence[str] | None = None) -> str:
    """The whole text up to where the model answers one turn.

    Parameters
    ----------
    example : Example
    turn : int
        Index of the turn to ask.
    history : sequence of str, optional
        Answers of the turns before; by default the golden ones.  Pass an empty sequence with
        ``turn`` for a request of its own (no earlier turn is shown).
    """
    earlier = example.turns[:turn]
    replies = [t.answers[0] for t in earlier] if history is None else list(history)
    if len(replies) not in (0, turn):
        raise ValueError(f"turn {turn} needs {turn} earlier answers or none, not {len(replies)}")
    join = example.join
    shown = "".join(
        join.ask(t.question) + join.reply(reply) for t, reply in zip(earlier, replies, strict=False)
    )
    return example.opening + shown + join.ask(example.turns[turn].question)
