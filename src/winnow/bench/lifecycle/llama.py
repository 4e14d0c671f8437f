"""llama.cpp as a peer of the lifecycle benchmark: the same weights and tokens, its own cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from winnow import api
from winnow.bench.lifecycle import memory
from winnow.bench.lifecycle.record import Reply
from winnow.bench.lifecycle.system import Conversation
from winnow.bench.llama_cpp import LlamaCpp

__all__ = ["LlamaSystem"]


class LlamaSystem:
    """llama.cpp in this process.

    Parameters
    ----------
    llm : LLM
        A model of Llama's own architecture.
    room : int
        Most tokens of a conversation: llama.cpp reserves its cache at the start.

    Raises
    ------
    ValueError
        Another architecture.
    """

    name = "llama.cpp"

    def __init__(self, llm: api.LLM, room: int) -> None:
        model: Any = llm.model
        module = getattr(model, "general", model).module
        if module.config.model_type != "llama":
            raise ValueError(f"it takes Llama's architecture only, not {module.config.model_type}")
        self._llm, self._room = llm, room
        self._library = LlamaCpp(module, torch.get_num_threads())
        self.about = {
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "nominal": 1.0,
            "note": "cache in f16; bytes are those of the sequence's saved state, not of what is reserved",
        }

    @contextmanager
    def open(self, *, requests: bool) -> Iterator[Conversation]:
        """See :class:`winnow.bench.lifecycle.system.System`."""
        self._library.begin(self._room)
        yield _Talk(self._library, self._llm)

    def resident(self) -> int | None:
        """See :class:`winnow.bench.lifecycle.system.System`."""
        return memory.restart()

    def peak(self) -> int | None:
        """See :class:`winnow.bench.lifecycle.system.System`."""
        return memory.peak()

    def close(self) -> None:
        """Free the cache."""
        self._library.drop()


class _Talk:
    """One conversation; going back cuts the sequence."""

    replayed = 0

    def __init__(self, library: LlamaCpp, llm: api.LLM) -> None:
        self._library, self._llm = library, llm
        self._pending: list[int] = []
        self._asked = 0

    def _answer(self, text: str, most: int, stop: tuple[str, ...]) -> Reply:
        llm, library = self._llm, self._library
        assert llm.text is not None, "the tasks are text"
        reused = library.length
        new = [*self._pending, *llm.tokens(text, special=not reused and not self._pending)]
        begun = time.perf_counter()
        generated = [library.extend(new)]
        first_at = time.perf_counter()
        self._asked = library.length
        reason = ""
        while True:
            answer = llm.text.decode(generated)
            cuts = [at for word in stop if (at := answer.find(word)) >= 0]
            if cuts or generated[-1] in llm.model.eos_token_ids:
                answer, reason = answer[: min(cuts)] if cuts else answer, "stop"
            elif len(generated) >= most:
                reason = "length"
            if reason:
                break
            generated.append(library.extend(generated[-1:]))
        ended = time.perf_counter()
        self._pending = generated[-1:]
        return Reply(
            text=answer,
            finish_reason=reason,
            tokens_computed=len(new),
            tokens_reused=reused,
            tokens_generated=len(generated),
            time_to_first_token=first_at - begun,
            decode_seconds=ended - first_at,
            bytes_stored={"host/f16": library.state_bytes()},
        )

    def read(self, text: str) -> Reply:
        reply = self._answer(text, 1, ())
        self._pending = []
        return reply

    def ask(self, text: str, *, max_new_tokens: int, stop: tuple[str, ...]) -> Reply:
        return self._answer(text, max_new_tokens, stop)

    def take_back(self) -> None:
        self._library.cut(self._asked)
        self._pending = []

    @contextmanager
    def branch(self) -> Iterator[Conversation]:
        length, pending = self._library.length, self._pending
        yield self
        self._library.cut(length)
        self._pending = pending

    def head_bytes(self) -> list[list[int]] | None:
        return None

    def entries(self) -> int | None:
        return None
