"""One sample on its way through the engine, and what its reader sees of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from winnow.engine.repair import Division
from winnow.engine.request import Result, Sample, SamplingParams
from winnow.engine.sequence import Sequence
from winnow.engine.steer import Steer
from winnow.engine.stopping import until_stop
from winnow.store.swap import Parked

__all__ = ["Event", "Run", "Suspended", "TextStream"]


class TextStream(Protocol):
    """Turns tokens into text one by one; a token may complete earlier bytes."""

    def push(self, token: int) -> str:
        """Text that became final with this token."""
        ...

    def finish(self) -> str:
        """What was still held back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Event:
    """One new token of one sample. ``text`` may be empty while bytes or a stop are open."""

    result: Result
    sample: Sample
    token: int
    text: str


@dataclass(kw_only=True)
class Run:
    """A sample that is being generated."""

    result: Result
    sample: Sample
    params: SamplingParams
    sequence: Sequence
    keep: bool  # the sequence outlives the request (a session's)
    submitted: float
    stream: torch.Generator | None
    words: TextStream | None
    steer: Steer | None
    siblings: list[Run] = field(default_factory=list)  # samples that wait for this prompt
    held: str = ""  # text that may be the beginning of a stop string
    first_token_at: float = 0.0
    prompt_end: int
    begin: tuple[int, int, int]  # where a session's turn began, for Sequence.rollback
    division: Division | None  # chunks to reuse before the first step

    @property
    def pending(self) -> int:
        """Tokens that wait to be computed."""
        return len(self.sequence.tokens) - self.sequence.store.length

    @property
    def divided(self) -> int:
        """Of these, how many come as chunks when it starts."""
        return 0 if self.division is None or self.sequence.store.length else sum(self.division.lengths)

    @property
    def prompting(self) -> bool:
        """Whether the prompt is not computed whole yet."""
        return self.sequence.store.length < self.prompt_end

    def until_stop(self, text: str) -> tuple[str, bool]:
        """What of a text may be shown, and whether a stop string was met."""
        if not self.params.stop:
            return text, False
        shown, self.held, stopped = until_stop(self.held + text, self.params.stop)
        return shown, stopped


@dataclass(frozen=True)
class Suspended:
    """A run whose entries wait in a swap."""

    run: Run
    parked: Parked
    started: bool
