"""Reading texts for their hidden states alone, in packed steps like any other request."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from winnow.engine.attend import StepAttention
from winnow.engine.engine import Engine
from winnow.engine.packing import pack
from winnow.engine.request import Result, Sample, SamplingParams, Stats
from winnow.engine.run import Event, Run
from winnow.engine.scheduler import Limits
from winnow.engine.sequence import Sequence
from winnow.kernels.backend import Backend
from winnow.recipe import Recipe
from winnow.types import Attend, LanguageModel

__all__ = ["Collector", "Embedder", "GivesHidden"]


@runtime_checkable
class GivesHidden(Protocol):
    """A model that gives its hidden states."""

    def hidden(self, token_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """``[N, K]`` after the final norm, in the model's dtype; see :meth:`LanguageModel.forward`."""
        ...


class Collector(Protocol):
    """Takes the hidden states of one text; :class:`winnow.models.pooling.Pool` is one."""

    def take(self, hidden_NK: Tensor) -> None:
        """The next ``[N, K]`` of them."""
        ...

    def result(self) -> Tensor:
        """``[E]`` float32, once all have been taken."""
        ...


@dataclass(kw_only=True)
class _Reading(Run):
    """A text on its way through the model."""

    collect: Collector


class Embedder(Engine):
    """Runs texts under full attention; nothing is drawn, reused or kept, and no token is an event.

    It schedules, accounts for and preempts like any engine: a long text advances in chunks, and its entries
    are freed with its last one.

    Parameters
    ----------
    model : LanguageModel
        One that gives its hidden states.
    limits : Limits
    backend : Backend

    Raises
    ------
    ValueError
        If the model does not give its hidden states.
    """

    def __init__(
        self, model: LanguageModel, *, limits: Limits | None = None, backend: Backend = "auto"
    ) -> None:
        if not isinstance(model, GivesHidden):
            raise ValueError(f"{model.name} does not give its hidden states; load it without swiftkv")
        super().__init__(model, Recipe(), limits=limits, backend=backend)
        self._hidden = model.hidden

    def read(self, tokens: Seq[int], collect: Collector) -> Result:
        """Queue a text; its result is :attr:`Result.finished` once ``collect`` has taken all of it.

        Raises
        ------
        ValueError
            Empty or too long a text, or a token outside the vocabulary.
        """
        if not 0 < len(tokens) <= self.model.max_length:
            raise ValueError(
                f"the text has {len(tokens)} tokens and {self.model.name} takes 1 to "
                f"{self.model.max_length}; divide it"
            )
        self._check_vocabulary(tokens)
        sequence = Sequence(self.recipe, self._store(len(tokens)))
        sequence.tokens = list(tokens)
        result = Result(
            prompt_token_ids=list(tokens), samples=[Sample()], stats=Stats(tokens_computed=len(tokens))
        )
        self._waiting.append(
            _Reading(
                result=result,
                sample=result.samples[0],
                params=SamplingParams(max_new_tokens=1),
                sequence=sequence,
                keep=False,
                submitted=time.perf_counter(),
                stream=None,
                words=None,
                steer=None,
                prompt_end=len(tokens),
                begin=(0, 0, 0),
                division=None,
                collect=collect,
            )
        )
        return result

    def _step(self) -> list[Event]:
        packed = pack(self._running, self._shares(self._running))
        with torch.inference_mode():
            ids_N, positions_N, _, _ = packed.tensors(self.model.device)
            attention = StepAttention(packed.slices, self.model.slots, self.backend)
            hidden_NK = self._hidden(ids_N, positions_N, attention)
            for part, run in zip(packed.slices, packed.runs, strict=True):
                assert isinstance(run, _Reading)
                run.sequence.store.advance(part.last - part.first)
                run.collect.take(hidden_NK[part.first : part.last])
                if part.final:
                    self._end(run)
        return []

    def _end(self, run: _Reading) -> None:
        stats = run.result.stats
        stats.time_to_first_token = time.perf_counter() - run.submitted
        stats.bytes_stored = run.sequence.bytes_stored()
        run.sample.finish_reason = "stop"
        self._running.remove(run)
        run.sequence.close()
