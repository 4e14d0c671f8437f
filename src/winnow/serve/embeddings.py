"""``/v1/embeddings``: texts in, vectors out, where the model is made for that."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.engine.embedding import Embedder
from winnow.engine.engine import Engine
from winnow.engine.request import Result
from winnow.models.pooling import Pool, Pooling, pooling_of
from winnow.recipe import Recipe
from winnow.serve.config import Settings
from winnow.serve.errors import ApiError
from winnow.serve.job import Job
from winnow.serve.schema import EmbeddingRequest
from winnow.serve.translate import Translator
from winnow.types import LanguageModel

__all__ = ["EMBEDDINGS", "Embeddings", "Reading", "ReadingJob"]

EMBEDDINGS = "embeddings"
"""What the engine that embeds is called among those of the recipes."""

_MAX_INPUTS = 2048  # as OpenAI has it


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A text to embed, and what takes its hidden states."""

    tokens: list[int]
    pool: Pool


@dataclass(kw_only=True, eq=False)
class ReadingJob(Job):
    """A text on its way through the server."""

    pool: Pool

    def submit(self, engine: Engine) -> Result:
        """See :meth:`Job.submit`."""
        assert isinstance(engine, Embedder)
        return engine.read(self.tokens, self.pool)


class Embeddings:
    """What bodies ask for, and what they get; any thread may use it.

    Parameters
    ----------
    settings : Settings
    translator : Translator
    model : LanguageModel

    Attributes
    ----------
    pooling : Pooling or None
        None where the model does not embed.
    """

    def __init__(self, settings: Settings, translator: Translator, model: LanguageModel) -> None:
        self._settings = settings
        self._step_tokens = settings.step_tokens(model.device, Recipe())
        self._translator = translator
        self.pooling: Pooling | None = None
        try:
            self.pooling = pooling_of(model)
        except ValueError as reason:
            self._why = str(reason)

    def about(self) -> dict[str, Any]:
        """What ``/server_info`` tells."""
        assert self.pooling is not None
        return {
            "dimensions": self.pooling.dimensions,
            "pooling": list(self.pooling.modes),
            "normalised": self.pooling.normalise,
            "prompts": list(self.pooling.prompts),
        }

    def readings(self, request: EmbeddingRequest) -> list[Reading]:
        """What a body asks for.

        Raises
        ------
        ApiError
            400 where the model does not embed, or not this.
        """
        if self.pooling is None:
            raise ApiError(400, self._why, param="model", code="model_not_supported")
        given = request.input
        if not isinstance(given, str) and not given:
            raise ApiError(400, "the input is empty; give at least one text", param="input")
        alone = isinstance(given, str) or isinstance(given[0], int)
        several: Sequence[Any] = [given] if alone else given
        if len(several) > _MAX_INPUTS:
            raise ApiError(400, f"more than {_MAX_INPUTS} texts in one request; divide them", param="input")
        return [self._reading(self.pooling, one, request) for one in several]

    def _reading(self, pooling: Pooling, text: str | list[int], request: EmbeddingRequest) -> Reading:
        limit = self._settings.max_model_len
        try:
            tokens, skip = self._translator.pooled(pooling, text, request.prompt_name)
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt_name") from error
        self._translator.check_tokens(tokens, param="input")
        if len(tokens) > limit:
            raise ApiError(
                400,
                f"this server reads texts of at most {limit} tokens, this one has {len(tokens)}; divide it",
                code="context_length_exceeded",
                param="input",
            )
        if request.dimensions is not None:
            try:
                pooling.check_dimensions(request.dimensions)
            except ValueError as error:
                raise ApiError(400, str(error), param="dimensions") from error
        try:
            pool = pooling.start(len(tokens), skip, request.dimensions)
        except ValueError as error:
            raise ApiError(400, str(error), param="input") from error
        return Reading(tokens=tokens, pool=pool)

    def waves(self, readings: Sequence[Reading]) -> Iterator[list[Reading]]:
        """What is queued at a time: about a step of the engine, so that no list of texts fills the queue."""
        wave: list[Reading] = []
        tokens, most = 0, min(self._settings.max_num_seqs, self._settings.max_queue)
        for reading in readings:
            full = tokens + len(reading.tokens) > self._step_tokens
            if wave and (full or len(wave) == most):
                yield wave
                wave, tokens = [], 0
            wave.append(reading)
            tokens += len(reading.tokens)
        yield wave

    def reply(self, request: EmbeddingRequest, readings: Sequence[Reading]) -> dict[str, Any]:
        """The answer, once everything is read."""
        tokens = sum(len(reading.tokens) for reading in readings)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(reading.pool, request)}
                for index, reading in enumerate(readings)
            ],
            "model": self._settings.served_model_name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _encoded(pool: Pool, request: EmbeddingRequest) -> list[float] | str:
    vector = pool.result().numpy()
    if request.encoding_format == "float":
        return [float(value) for value in vector]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
