"""What can take part in the lifecycle benchmark, and Winnow itself under a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from winnow import api
from winnow.bench.lifecycle import memory
from winnow.bench.lifecycle.record import Reply
from winnow.engine.request import Result, SamplingParams
from winnow.engine.session import Session
from winnow.models.swiftkv.model import transformed
from winnow.recipe import Recipe

__all__ = ["Conversation", "System", "WinnowSystem"]


class Conversation(Protocol):
    """One context and what is asked about it."""

    def read(self, text: str) -> Reply:
        """Append a text without answering it."""
        ...

    def ask(self, text: str, *, max_new_tokens: int, stop: tuple[str, ...]) -> Reply:
        """Append a text and answer it greedily; text and answer stay."""
        ...

    def take_back(self) -> None:
        """Forget the last answer, not what asked for it."""
        ...

    @property
    def replayed(self) -> int:
        """Prompt tokens that :meth:`take_back` had to compute again, outside every measure."""
        ...

    def branch(self) -> AbstractContextManager[Conversation]:
        """A conversation that goes on from here and is forgotten at the end of the block."""
        ...

    def head_bytes(self) -> list[list[int]] | None:
        """Bytes of the entries by layer and KV head; None where that is not known."""
        ...

    def entries(self) -> int | None:
        """Entries of all layers and KV heads; None where that is not known."""
        ...


class System(Protocol):
    """A contender: something that holds conversations."""

    @property
    def name(self) -> str:
        """As it stands in tables."""
        ...

    def open(self, *, requests: bool) -> AbstractContextManager[Conversation]:
        """An empty conversation in which nothing of an earlier one is left.

        ``requests`` says that it will be read once and then asked in branches only.
        """
        ...

    def resident(self) -> int | None:
        """Resident bytes of the process that does the work; its peak is counted from here."""
        ...

    def peak(self) -> int | None:
        """Most resident bytes since :meth:`resident`."""
        ...


class WinnowSystem:
    """A recipe on a model.

    Parameters
    ----------
    name : str
    llm : LLM
        Gives model and tokenizer, which all systems of a run share.
    recipe : Recipe
    """

    def __init__(self, name: str, llm: api.LLM, recipe: Recipe) -> None:
        recipe.check(layers=llm.model.layers)
        self.name = name
        self.recipe = recipe
        self._llm = llm
        self._model = transformed(llm.model, recipe.generation)

    @contextmanager
    def open(self, *, requests: bool) -> Iterator[Conversation]:
        """See :class:`System`. Every conversation has an engine, and so a pool, of its own."""
        engine = self._llm.engine
        llm = api.LLM(self._model, self._llm.text, self.recipe, engine.limits, engine.backend)
        talk = (_Requests if requests and self.recipe.retrieval is not None else _Session)(llm)
        try:
            yield talk
        finally:
            talk.close()

    def resident(self) -> int | None:
        """See :class:`System`."""
        return memory.restart()

    def peak(self) -> int | None:
        """See :class:`System`."""
        return memory.peak()


class _Session:
    """A session; a branch is a fork of it."""

    def __init__(self, llm: api.LLM, session: Session | None = None) -> None:
        self._llm = llm
        self._session = session if session is not None else Session(llm.engine)
        self._prompts: list[str] = []
        self._asked = 0  # tokens up to the end of the last question
        self.replayed = 0

    def _run(self, text: str, params: SamplingParams) -> Result:
        self._prompts.append(text)
        tokens = self._llm.tokens(text, special=not self._session.tokens)
        return self._session.run(tokens, params)

    def read(self, text: str) -> Reply:
        result = self._run(text, SamplingParams(max_new_tokens=1))
        # A prompt ends in logits, so the engine draws a token, which was never computed.
        self._session.rewind(len(self._session.tokens) - 1)
        return _reply(self._llm, result)

    def ask(self, text: str, *, max_new_tokens: int, stop: tuple[str, ...]) -> Reply:
        result = self._run(text, SamplingParams(max_new_tokens=max_new_tokens, stop=stop))
        self._asked = len(self._session.tokens) - len(result.token_ids)
        return _reply(self._llm, result)

    def take_back(self) -> None:
        try:
            self._session.rewind(self._asked)
        except ValueError:
            # What a compression dropped while the answer was decoded cannot come back: hold the
            # same conversation again, without the answers.
            self._session.close()
            self._session = Session(self._llm.engine)
            prompts, self._prompts = self._prompts, []
            self.replayed += sum(self.read(prompt).tokens_computed for prompt in prompts)

    @contextmanager
    def branch(self) -> Iterator[Conversation]:
        child = _Session(self._llm, self._session.fork())
        try:
            yield child
        finally:
            child.close()

    def head_bytes(self) -> list[list[int]] | None:
        return self._session.head_bytes()

    def entries(self) -> int | None:
        return sum(map(sum, self._session.head_entries()))

    def close(self) -> None:
        self._session.close()


class _Requests:
    """Requests that share a context through the recipe's pool instead of a session."""

    def __init__(self, llm: api.LLM) -> None:
        self._llm = llm
        self._context: list[int] = []
        self.replayed = 0

    def _tokens(self, text: str) -> list[int]:
        return [*self._context, *self._llm.tokens(text, special=not self._context)]

    def read(self, text: str) -> Reply:
        self._context = self._tokens(text)
        return _reply(self._llm, self._llm.generate(self._context, max_new_tokens=1, ignore_eos=True))

    def ask(self, text: str, *, max_new_tokens: int, stop: tuple[str, ...]) -> Reply:
        tokens = self._tokens(text)
        return _reply(self._llm, self._llm.generate(tokens, max_new_tokens=max_new_tokens, stop=stop))

    def take_back(self) -> None:
        pass  # a request leaves nothing in the conversation

    @contextmanager
    def branch(self) -> Iterator[Conversation]:
        yield self

    def head_bytes(self) -> list[list[int]] | None:
        return None  # a request's entries are freed when it ends

    def entries(self) -> int | None:
        return None

    def close(self) -> None:
        pass


def _reply(llm: api.LLM, result: Result) -> Reply:
    stats, stored = result.stats, dict(result.stats.bytes_stored)
    pool = llm.engine.pool
    if pool is not None:
        # Entries borrowed from the pool are among what it holds.
        stored.pop("host/shared", None)
        stored["host/pool"] = pool.bytes()
    return Reply(
        text=result.text,
        finish_reason=result.finish_reason,
        tokens_computed=stats.tokens_computed,
        tokens_reused=stats.tokens_reused,
        tokens_generated=stats.tokens_generated,
        score_entries=stats.score_entries,
        decode_score_entries=stats.decode_score_entries,
        time_to_first_token=stats.time_to_first_token,
        decode_seconds=stats.decode_seconds,
        bytes_stored=stored,
        bytes_read=dict(stats.bytes_read),
        entries_before=stats.entries_before,
        entries_after=stats.entries_after,
    )
