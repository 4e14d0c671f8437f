"""What the lifecycle benchmark measures: one record per turn, one line of the journal per example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["CONTEXT", "ExampleRecord", "Key", "Reply", "TurnRecord"]

CONTEXT = 0
"""Turn number of a context that was read without a question; questions count from 1."""

#: what identifies an example's line: system, mode, task, length, number
Key = tuple[str, str, str, int, int]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a system answered and what that cost; a figure that it cannot count is None.

    Attributes
    ----------
    text : str
        Without special tokens, cut before a stop string.
    finish_reason : str
        ``stop`` or ``length``.
    tokens_computed, tokens_reused : int
        Prompt tokens that were run through the model, and that were there already.
    tokens_generated : int
    score_entries, decode_score_entries : int or None
        Query-key scores computed while prefilling and while decoding.
    time_to_first_token, decode_seconds : float
        Seconds; decoding starts where the first token ends.
    bytes_stored : dict
        KV bytes held when the answer was complete, by ``tier/codec``.
    bytes_read : dict or None
        KV bytes read while decoding, all steps together, by ``tier/codec``.
    entries_before, entries_after : int
        Entries before and after the compressions of this turn; 0 where there was none.
    """

    text: str
    finish_reason: str
    tokens_computed: int
    tokens_reused: int
    tokens_generated: int
    time_to_first_token: float
    decode_seconds: float
    bytes_stored: dict[str, int]
    score_entries: int | None = None
    decode_score_entries: int | None = None
    bytes_read: dict[str, int] | None = None
    entries_before: int = 0
    entries_after: int = 0

    @property
    def decode_steps(self) -> int:
        """Tokens after the first, which the prefill gives."""
        return max(self.tokens_generated - 1, 0)

    @property
    def stored(self) -> int:
        """KV bytes held, all tiers together."""
        return sum(self.bytes_stored.values())

    @property
    def read(self) -> int | None:
        """KV bytes read while decoding, all tiers and steps together."""
        return None if self.bytes_read is None else sum(self.bytes_read.values())


@dataclass(frozen=True, kw_only=True)
class TurnRecord:
    """One turn of one example under one system.

    Attributes
    ----------
    turn : int
        From 1; :data:`CONTEXT` is a context that was read without a question.
    depth : float or None
        Where in the context the answer lies, 0 to 1.
    score : float or None
        0 to 1; None for a context.
    reply : Reply
    """

    turn: int
    depth: float | None
    score: float | None
    reply: Reply


@dataclass(frozen=True, kw_only=True)
class ExampleRecord:
    """All turns of one example under one system in one mode.

    Attributes
    ----------
    system, mode, task, category : str
    length, number : int
        Tokens of the context as asked for, and which example of that length it is.
    checksum : str
        Of the example: two runs compare only where it is equal.
    turns : tuple of TurnRecord
    head_bytes : list of list of int, or None
        Bytes of the entries by layer and KV head after the last turn.
    entries : int or None
        How many entries that is.
    resident_bytes, peak_bytes : int or None
        Resident memory of the process before the example, and its peak meanwhile.
    replayed_tokens : int
        Prompt tokens computed again, outside every measure, because what a compression did
        while an answer was decoded could not be taken back.
    seconds : float
        Wall clock of the whole example.
    """

    system: str
    mode: str
    task: str
    category: str
    length: int
    number: int
    checksum: str
    turns: tuple[TurnRecord, ...]
    head_bytes: list[list[int]] | None = None
    entries: int | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    replayed_tokens: int = 0
    seconds: float = field(default=0.0)

    @property
    def key(self) -> Key:
        """What identifies the example in a run."""
        return (self.system, self.mode, self.task, self.length, self.number)

    @property
    def questions(self) -> tuple[TurnRecord, ...]:
        """The turns that were scored."""
        return tuple(turn for turn in self.turns if turn.turn != CONTEXT)

    @property
    def first_token_seconds(self) -> float:
        """Seconds from nothing to the first token of the first answer, the context's reading included."""
        return sum(turn.reply.time_to_first_token for turn in self.turns if turn.turn <= 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExampleRecord:
        """Read what :meth:`to_dict` wrote; fields that are unknown here are left out."""
        turns = tuple(
            TurnRecord(**{**turn, "reply": Reply(**_known(Reply, turn["reply"]))}) for turn in data["turns"]
        )
        return cls(**{**_known(cls, data), "turns": turns})


def _known(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    return {name: value for name, value in data.items() if name in names}
