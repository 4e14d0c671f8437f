"""Hogwild! Inference: several workers of one model that read each other's tokens as they are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from winnow.engine.request import SamplingParams, Stats
from winnow.engine.sampling import generator, sample
from winnow.engine.shared_blocks import Block, View, forward
from winnow.kernels.backend import Backend
from winnow.types import LanguageModel

__all__ = ["Crew", "Hogwild", "Layout", "WorkersResult"]

Layout = Literal["contiguous", "interleaved", "combined"]
Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Hogwild:
    """How the workers share their cache and what they are told.

    Source: Hogwild! Inference (arXiv 2504.06261), eqimp/hogwild_llm (``shared_cache/``,
    ``generation.py``, ``formatting.py``).

    Attributes
    ----------
    layout : {"contiguous", "interleaved", "combined"}
        ``contiguous``: a worker sees the prompt, what each other worker has written so far, and its own
        text last. ``interleaved``: the prompt and all finished steps in the order in which they were
        finished, then its own present step. ``combined``: that, and the present steps of the others
        before its own.
    names : tuple of str
        One per worker; their number is that of the workers.
    header : str
        What a worker's step begins with; ``{name}`` and ``{number}`` are filled in.
    current : str
        Stands before the present steps of the others (``combined``).
    step_end : str
        A step ends where the worker's text ends with this.
    nudge : str
        Message that a worker is given at the begin of a step when it has written ``nudge_every`` tokens
        since the last; empty for none.
    nudge_every : int
        Tokens between two messages.
    answer : str
        What worker 0 is given when all are done, before it writes up to ``answer_tokens`` tokens; empty for
        none.
    answer_tokens : int

    Notes
    -----
    Deviations from the official code:

    - Queries are turned, once per worker and block, in place of all keys at every step (the paper's own
      formulation; the code turns keys). Angles are unscaled, so models with YaRN are served too.
    - Any number of workers; the code has two. All three layouts of the paper; the code has one.
    - Headers are read in place, behind what the worker sees. The code computes them alone, so that the
      first token of each becomes another attention sink.
    - A step's entries were computed under one worker's view and are reused under others': that is the
      method's own approximation and kept.
    """

    layout: Layout = "combined"
    names: tuple[str, ...] = ("Alice", "Bob")
    header: str = "**{name} [{number}]:**"
    current: str = ""
    step_end: str = "\n\n"
    nudge: str = ""
    nudge_every: int = 256
    answer: str = ""
    answer_tokens: int = 16

    def __post_init__(self) -> None:
        if self.layout not in ("contiguous", "interleaved", "combined"):
            raise ValueError(
                f"hogwild: layout={self.layout!r} is unknown; give 'contiguous', 'interleaved' or 'combined'"
            )
        if not self.names:
            raise ValueError("hogwild: there are no workers; give at least one name")
        if self.nudge_every < 1 or self.answer_tokens < 1:
            raise ValueError("hogwild: nudge_every and answer_tokens count tokens; give at least 1")

    def run(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        params: SamplingParams,
        encode: Encode,
        decode: Decode,
        *,
        backend: Backend = "auto",
    ) -> WorkersResult:
        """Read the prompt once and let all workers write until each has ended or has no tokens left.

        Parameters
        ----------
        model : LanguageModel
        prompt : sequence of int
        params : SamplingParams
            ``max_new_tokens`` per worker; worker ``i`` draws from ``seed + i``.
        encode, decode : callable
            Text to tokens (without special ones) and back.

        Raises
        ------
        ValueError
            Empty prompt, a model whose positions cannot be moved, or views that outgrow the model.
        """
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        with Crew(self, model, encode, decode, backend=backend) as crew:
            return crew.run(list(prompt), params)


@dataclass(kw_only=True)
class WorkersResult:
    """What the workers wrote.

    Attributes
    ----------
    texts : list of str
        Each worker's own text, headers left out.
    token_ids : list of list of int
    answer : str
        What worker 0 wrote behind :attr:`Hogwild.answer`.
    steps : int
        Forward passes; each gives every running worker one token.
    seconds : float
        Time of those, the prompt's left out.
    bytes_stored : int
        Measured bytes of all blocks at the end.
    bytes_read : int
        KV bytes that those passes read; what several workers read together counts once.
    """

    texts: list[str]
    token_ids: list[list[int]]
    answer: str = ""
    steps: int = 0
    seconds: float = 0.0
    bytes_stored: int = 0
    bytes_read: int = 0


@dataclass(kw_only=True)
class _Worker:
    name: str
    block: Block
    number: int = 0  # of its present step
    written: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)  # what it wrote of its present step
    since_nudge: int = 0
    pending: list[int] = field(default_factory=list)  # tokens it is to read next
    done: bool = False


class Crew:
    """The workers of one run, and their blocks.

    Attributes
    ----------
    common : Block
        What all see first: the prompt, and finished steps. What it holds when a run begins stays in front.
    """

    def __init__(
        self,
        how: Hogwild,
        model: LanguageModel,
        encode: Encode,
        decode: Decode,
        *,
        backend: Backend = "auto",
    ) -> None:
        self._how = how
        self._model = model
        self._encode = encode
        self._decode = decode
        self._backend = backend
        self.common = Block(model)
        self._current = Block(model)
        self._workers = [_Worker(name=name, block=Block(model)) for name in how.names]

    def run(self, prompt: list[int], params: SamplingParams) -> WorkersResult:
        """See :meth:`Hogwild.run`; once per crew."""
        # A worker that is told nothing begins by reading the prompt's last token itself.
        silent = not self._encode(self._how.header.format(name=self._how.names[0], number=1))
        shared = prompt[:-1] if silent else prompt
        if shared:
            forward(self._model, [View([self.common])], [shared], backend=self._backend)
        if self._how.current and self._how.layout == "combined":
            shown = View([self.common, self._current])
            forward(self._model, [shown], [self._encode(self._how.current)], backend=self._backend)
        streams = [generator(params, i) for i in range(len(self._workers))]
        for worker in self._workers:
            worker.pending = prompt[len(shared) :]
            self._begin(worker)
        steps, stats, began = 0, Stats(), time.perf_counter()
        while running := [i for i, worker in enumerate(self._workers) if not worker.done]:
            logits_WV = self._read([self._workers[i] for i in running], stats)
            steps += 1
            for row, i in enumerate(running):
                self._take(self._workers[i], sample(logits_WV[row], params, streams[i]), params)
        seconds = time.perf_counter() - began
        held = sum(block.nbytes() for block in self._blocks())
        answer = self._conclude(params) if self._how.answer else ""
        return WorkersResult(
            texts=[self._decode(worker.written) for worker in self._workers],
            token_ids=[worker.written for worker in self._workers],
            answer=answer,
            steps=steps,
            seconds=seconds,
            bytes_stored=held,
            bytes_read=sum(stats.bytes_read.values()),
        )

    def _view(self, worker: _Worker) -> View:
        others = [other.block for other in self._workers if other is not worker]
        if self._how.layout == "interleaved":
            return View([self.common, worker.block])
        if self._how.layout == "contiguous":
            return View([self.common, *others, worker.block])
        return View([self.common, self._current, *others, worker.block])

    def _read(self, workers: list[_Worker], stats: Stats | None = None) -> Tensor:
        tokens = [worker.pending for worker in workers]
        views = [self._view(worker) for worker in workers]
        logits = forward(self._model, views, tokens, stats=stats, backend=self._backend)
        for worker in workers:
            worker.pending = []
        return logits

    def _begin(self, worker: _Worker) -> None:
        """The first tokens of a step: the header, and the message where it is due."""
        worker.number += 1
        worker.present = []
        text = self._how.header.format(name=worker.name, number=worker.number)
        if self._how.nudge and worker.since_nudge >= self._how.nudge_every:
            text += self._how.nudge
            worker.since_nudge = 0
        worker.pending += self._encode(text)

    def _take(self, worker: _Worker, token: int, params: SamplingParams) -> None:
        worker.written.append(token)
        worker.present.append(token)
        worker.pending.append(token)
        worker.since_nudge += 1
        ended = not params.ignore_eos and token in self._model.eos_token_ids
        if ended or len(worker.written) >= params.max_new_tokens:
            worker.done = True
        elif self._how.layout != "contiguous" and self._step_ended(worker):
            # The step's last token has no entry yet: it is read at the begin of the next step.
            worker.block.move_into(self.common, self._model)
            self._begin(worker)

    def _step_ended(self, worker: _Worker) -> bool:
        return bool(self._how.step_end) and self._decode(worker.present).endswith(self._how.step_end)

    def _conclude(self, params: SamplingParams) -> str:
        worker = self._workers[0]
        worker.pending += self._encode(self._how.answer)
        out: list[int] = []
        stream = generator(params, len(self._workers))
        while len(out) < self._how.answer_tokens:
            token = sample(self._read([worker])[0], params, stream)
            out.append(token)
            worker.pending = [token]
            if not params.ignore_eos and token in self._model.eos_token_ids:
                break
        return self._decode(out)

    def _blocks(self) -> list[Block]:
        return [self.common, self._current, *(worker.block for worker in self._workers)]

    def close(self) -> None:
        """Free the entries."""
        for block in self._blocks():
            block.store.close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
