"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Result", "Sample", "SamplingParams", "Stats"]

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a sample ends.

    Attributes
    ----------
    max_new_tokens : int
    temperature : float
        0 is greedy.
    top_p : float
        Smallest set of tokens whose probabilities add up to this; 1 keeps all.
    top_k : int
        Only so many most likely tokens; 0 keeps all.
    min_p : float
        Only tokens at least this likely relative to the likeliest; 0 keeps all.
    seed : int or None
        Sample ``i`` of a request draws from ``seed + i``; None is not reproducible.
    stop : tuple of str
        The text ends before the first of these.
    ignore_eos : bool
        Go on after an end-of-sequence token.
    n : int
        Samples per prompt; the prompt is computed once.
    logprobs : int or None
        Also return the log-probability of each token and of so many alternatives.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (self.temperature >= 0.0, "temperature must not be negative; 0 is greedy"),
            (0.0 < self.top_p <= 1.0, "top_p must lie in (0, 1]; 1 keeps every token"),
            (self.top_k >= 0, "top_k must not be negative; 0 keeps every token"),
            (0.0 <= self.min_p <= 1.0, "min_p must lie in [0, 1]; 0 keeps every token"),
            (self.n >= 1, "n must be at least 1"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs must not be negative"),
            (all(self.stop), "a stop string must not be empty"),
            (
                self.n == 1 or self.temperature > 0.0,
                "n > 1 with temperature 0 gives the same text n times; set a temperature",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)


@dataclass(kw_only=True)
class Stats:
    """What a request cost; every figure is counted or measured, none is derived from a ratio.

    Attributes
    ----------
    tokens_computed, tokens_reused : int
        Prompt tokens that were run through the model, and that came from a pool or an earlier
        turn with exactly the entries that computing them would give.
    tokens_approximate : int
        Prompt tokens whose entries came from a pool and were computed in another context, or
        rounded.
    tokens_repaired : int
        Tokens of chunks that passed through all layers once more, to fit their entries to the prompt
        (the layers up to the one that chooses are passed by all).
    tokens_generated : int
    score_entries : int
        Query-key scores computed while prefilling, summed over layers and query heads; those
        that a pattern computed to choose are among them.
    decode_score_entries : int
        The same while decoding.
    time_to_first_token, decode_seconds : float
        Seconds; decoding starts where the first token ends.
    bytes_stored : dict
        KV bytes held when the request ended, by ``tier/codec``; side data of a selector is
        ``host/index``, what a compression remembers ``host/state``; entries borrowed from
        a pool are ``host/shared``.
    bytes_read : dict
        KV bytes read while decoding, all steps together, by ``tier/codec``; what a selector
        scans to choose is ``host/index``.
    entries_before, entries_after : int
        Entries (over layers and KV heads) before and after the compression of this request.
    """

    tokens_computed: int = 0
    tokens_reused: int = 0
    tokens_approximate: int = 0
    tokens_repaired: int = 0
    tokens_generated: int = 0
    score_entries: int = 0
    decode_score_entries: int = 0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    bytes_stored: dict[str, int] = field(default_factory=dict)
    bytes_read: dict[str, int] = field(default_factory=dict)
    entries_before: int = 0
    entries_after: int = 0

    @property
    def decode_steps(self) -> int:
        """Steps after the first token, which prefill gives."""
        return max(self.tokens_generated - 1, 0)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first one per second; 0 where there was only one."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def bytes_read_per_token(self) -> float:
        """KV bytes read per decoded token after the first."""
        return sum(self.bytes_read.values()) / self.decode_steps if self.decode_steps else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, the derived ones included."""
        return {
            **self.__dict__,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "bytes_read_per_token": self.bytes_read_per_token,
        }


@dataclass(kw_only=True)
class Sample:
    """One drawn continuation.

    Attributes
    ----------
    token_ids : list of int
        An end-of-sequence token is included where one was drawn.
    text : str
        Without special tokens, cut before a stop string.
    finish_reason : {"", "stop", "length", "cancelled"}
        Empty while it runs.
    logprobs : list of dict, or None
        Per token: ``token_id``, ``logprob``, ``top`` (list of ``(token_id, logprob)``).
    """

    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    logprobs: list[dict[str, Any]] | None = None


@dataclass(kw_only=True)
class Result:
    """What a request gave: the first sample at the surface, all of them in ``samples``."""

    prompt_token_ids: list[int]
    samples: list[Sample]
    stats: Stats
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first sample."""
        return self.samples[0].token_ids

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.samples[0].text

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finish_reason for sample in self.samples)

    @property
    def finish_reason(self) -> str:
        """Why the first sample ended."""
        return self.samples[0].finish_reason

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "prompt_tokens": len(self.prompt_token_ids),
            "samples": [sample.__dict__ for sample in self.samples],
            "stats": self.stats.to_dict(),
        }
