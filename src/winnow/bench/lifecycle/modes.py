"""How a context is shared: turns of one conversation, or requests that know nothing of each other.

The two modes are those of SCBench (arXiv 2412.10319), the first in two forms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from winnow.bench.lifecycle.record import CONTEXT, ExampleRecord, Reply, TurnRecord
from winnow.bench.lifecycle.system import Conversation, System
from winnow.bench.scorers import SCORERS
from winnow.bench.tasks.example import Example, Join, Turn

__all__ = ["MODES", "REQUESTS", "hold", "stop"]


def _turns(talk: Conversation, example: Example, *, own: bool) -> Iterator[TurnRecord]:
    join, text = example.join, example.opening
    for number, turn in enumerate(example.turns, 1):
        reply = talk.ask(
            text + join.ask(turn.question), max_new_tokens=turn.max_new_tokens, stop=stop(example.join)
        )
        yield _record(number, turn, reply)
        if number < len(example.turns):
            # An earlier answer is shown as text, the model's own too: it is what a client would send.
            talk.take_back()
            text = join.reply(reply.text if own else turn.answers[0])


def _requests(talk: Conversation, example: Example) -> Iterator[TurnRecord]:
    yield TurnRecord(turn=CONTEXT, depth=None, score=None, reply=talk.read(example.opening))
    for number, turn in enumerate(example.turns, 1):
        with talk.branch() as request:
            reply = request.ask(
                example.join.ask(turn.question),
                max_new_tokens=turn.max_new_tokens,
                stop=stop(example.join),
            )
        yield _record(number, turn, reply)


REQUESTS = "multi-request"

MODES: dict[str, Callable[[Conversation, Example], Iterator[TurnRecord]]] = {
    "multi-turn": partial(_turns, own=False),
    "multi-turn-own": partial(_turns, own=True),
    REQUESTS: _requests,
}
"""Turns after golden answers, turns after the model's own answers, and separate requests."""


def stop(join: Join) -> tuple[str, ...]:
    """What ends an answer: the text that follows one, or that opens the next question."""
    closing = join.answer.partition("{answer}")[2]
    opening = join.question.partition("{question}")[0].rstrip(" ")
    return tuple(text for text in (closing or opening,) if text)


def hold(system: System, mode: str, example: Example) -> ExampleRecord:
    """Hold one example's conversation with a system.

    Parameters
    ----------
    system : System
    mode : str
        Key of :data:`MODES`.
    example : Example
    """
    before = system.resident()
    begun = time.perf_counter()
    with system.open(requests=mode == REQUESTS) as talk:
        turns = tuple(MODES[mode](talk, example))
        heads, entries, replayed = talk.head_bytes(), talk.entries(), talk.replayed
    return ExampleRecord(
        system=system.name,
        mode=mode,
        task=example.task,
        category=example.category,
        length=example.length,
        number=example.number,
        checksum=example.checksum,
        turns=turns,
        head_bytes=heads,
        entries=entries,
        resident_bytes=before,
        peak_bytes=system.peak(),
        replayed_tokens=replayed,
        seconds=time.perf_counter() - begun,
    )


def _record(number: int, turn: Turn, reply: Reply) -> TurnRecord:
    score = float(SCORERS[turn.scorer](turn, reply.text))
    return TurnRecord(turn=number, depth=turn.depth, score=score, reply=reply)
