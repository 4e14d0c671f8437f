"""The engine's loop: requests in, packed steps, tokens out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from functools import partial

import torch

from winnow.engine.apart import prefilled
from winnow.engine.attend import Slice, StepAttention
from winnow.engine.compress import growth
from winnow.engine.packing import pack
from winnow.engine.probe import probe
from winnow.engine.repair import Division, Repair
from winnow.engine.request import Result, Sample, SamplingParams, Stats
from winnow.engine.run import Event, Run, Suspended, TextStream
from winnow.engine.sampling import generator, logprob_record, sample
from winnow.engine.scheduler import Limits, share
from winnow.engine.sequence import Holder, Sequence
from winnow.engine.steer import Steer
from winnow.kernels.backend import Backend
from winnow.profiles import load_profile
from winnow.recipe import Recipe
from winnow.retrieval.protocol import Match, Pool, reuses_chunks, reuses_prefixes
from winnow.store.arena import PAGE
from winnow.store.sequence import SequenceStore
from winnow.store.swap import Swap
from winnow.types import LanguageModel, Profile

__all__ = ["Engine", "Event", "Progress", "TextStream"]

# Called after every step with prompt tokens computed so far and in all, and tokens generated.
Progress = Callable[[int, int, int], None]


class Engine:
    """Runs requests on one model under one recipe.

    Parameters
    ----------
    model : LanguageModel
    recipe : Recipe
    limits : Limits
    backend : Backend
        Demanded kernel implementation; ``auto`` takes the fastest that can run.
    words : callable or None
        Makes a :class:`TextStream`; None leaves every text empty (models without a tokenizer).
    """

    def __init__(
        self,
        model: LanguageModel,
        recipe: Recipe,
        *,
        limits: Limits | None = None,
        backend: Backend = "auto",
        words: Callable[[], TextStream] | None = None,
    ) -> None:
        recipe.check(layers=model.layers)
        self.model = model
        self.recipe = recipe
        self.limits = limits or Limits()
        self.backend = backend
        self._words = words
        self.pool: Pool | None = None
        self._codec = "raw"  # of what the pool holds
        self.repair: Repair | None = None
        if recipe.retrieval is not None and reuses_chunks(recipe.retrieval):
            compute = partial(prefilled, room=self._store, model=model, recipe=recipe)
            self.repair = Repair(
                model,
                recipe.retrieval,
                partial(compute, limits=self.limits, backend=backend),
                rows=self.limits.max_num_batched_tokens,
                dense=recipe.generation is None,
                backend=backend,
            )
        elif recipe.retrieval is not None and reuses_prefixes(recipe.retrieval):
            self.pool = recipe.retrieval.pool()
            self._codec = recipe.retrieval.codec
        self.profile: Profile | None = None
        if recipe.profile is not None:
            self.profile = load_profile(recipe.profile, model=model.fingerprint)
        self._running: list[Run] = []
        self._waiting: list[Run] = []
        self._suspended: dict[int, list[Suspended]] = {}  # by number of the result
        self._prompts: list[Sequence] = []  # read by several samples

    # ------------------------------------------------------------------ requests

    def new_sequence(self) -> Sequence:
        """An empty sequence with room for as many tokens as the model can take."""
        return Sequence(self.recipe, self._store(self.model.max_length), self.profile)

    def _store(self, capacity: int) -> SequenceStore:
        model = self.model
        return SequenceStore(
            layers=max(model.slots) + 1,
            heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            capacity=capacity,
            device=str(model.device),
        )

    def submit(
        self,
        tokens: Seq[int],
        params: SamplingParams,
        *,
        sequence: Sequence | None = None,
        salt: str = "",
        steer: Callable[[], Steer] | None = None,
        division: Division | None = None,
    ) -> Result:
        """Queue a request; :meth:`events` or :meth:`step` runs it.

        Parameters
        ----------
        tokens : sequence of int
            The prompt, or what a session's turn adds to ``sequence``.
        params : SamplingParams
        sequence : Sequence or None
            Continue this one (it stays open afterwards); None starts a new one.
        salt : str
            Requests of different salts share nothing through the pool.
        steer : callable or None
            Makes what bends the logits of one sample; log-probabilities stay those of the model.
        division : Division or None
            Chunks at the beginning of ``tokens`` that may be reused. Without a recipe that reuses
            chunks they are computed like the rest.

        Raises
        ------
        ValueError
            Empty prompt, token outside the vocabulary, or no room for one new token.
        """
        earlier = len(sequence.tokens) if sequence is not None else 0
        self._check(tokens, earlier)
        if division is not None:
            division.check(len(tokens))
            if earlier:
                raise ValueError("chunks are reused at the beginning of a session only; give text or tokens")
        stats = Stats()
        samples = [Sample(index=i, logprobs=None if params.logprobs is None else []) for i in range(params.n)]
        result = Result(prompt_token_ids=list(tokens), samples=samples, stats=stats)
        keep = sequence is not None
        if keep and params.n > 1:
            raise ValueError("a session continues one text; ask for n > 1 outside a session")
        own = sequence if sequence is not None else self.new_sequence()
        if not keep:
            self._reuse(own, tokens, salt)
        begin = (len(own.tokens), own.store.length, own.turns)
        if self._codec == "raw" or keep:
            stats.tokens_reused = own.store.length
        else:
            stats.tokens_approximate = own.store.length
        own.tokens.extend(tokens)
        if own.compression is not None:
            active = own.compression.acts_on_turn(own.turns)
            own.compression.queries.begin(own.store.length, len(own.tokens), active=active)
        stats.tokens_computed = len(own.tokens) - own.store.length
        now = time.perf_counter()
        runs = [
            Run(
                result=result,
                sample=s,
                params=params,
                sequence=own,
                keep=keep,
                submitted=now,
                stream=generator(params, s.index),
                words=self._words() if self._words else None,
                steer=steer() if steer is not None else None,
                prompt_end=len(own.tokens),
                begin=begin,
                division=division if self.repair is not None else None,
            )
            for s in samples
        ]
        runs[0].siblings = runs[1:]
        own.salt = salt
        self._waiting.append(runs[0])
        return result

    def _check(self, tokens: Seq[int], earlier: int) -> None:
        self.check_generates()
        if len(tokens) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        self._check_vocabulary(tokens)
        total, limit = earlier + len(tokens), self.model.max_length
        if total >= limit:
            raise ValueError(
                f"the prompt has {total} tokens and {self.model.name} takes {limit}, "
                "one of them new; shorten it or choose a model with a longer context"
            )

    def _check_vocabulary(self, tokens: Seq[int]) -> None:
        if min(tokens) < 0 or max(tokens) >= self.model.vocab_size:
            raise ValueError(f"a token id lies outside the vocabulary of {self.model.vocab_size}")

    def check_generates(self) -> None:
        """Refuse a model that came without a head of its own, so that it embeds and does not generate."""
        if not self.model.generates:
            raise ValueError(f"{self.model.name} embeds texts and generates none; use llm.embed")

    def cancel(self, result: Result) -> None:
        """Stop every sample of a request now and free what it holds."""
        for queue in (self._running, self._waiting):
            for run in [r for r in queue if r.result is result]:
                queue.remove(run)
                for one in [run, *run.siblings]:
                    one.sample.finish_reason = "cancelled"
                self._end_sequence(run)
        for away in self._suspended.pop(result.number, []):
            away.run.sample.finish_reason = "cancelled"
            away.parked.drop()

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits to run; suspended requests do neither."""
        return bool(self._running or self._waiting)

    # ------------------------------------------------------------------ the loop

    def events(self, progress: Progress | None = None) -> Iterator[Event]:
        """Run until every submitted request has ended, giving tokens as they come.

        An exception or an abandoned iteration (Ctrl-C included) frees every running sequence
        and rolls a session's sequence back to where its turn began.
        """
        try:
            while self.busy:
                yield from self.step()
                if progress is not None:
                    progress(*self._progress())
        except BaseException:
            self.abort()
            raise

    def step(self) -> list[Event]:
        """Start what may run, advance it by one step, and return the tokens that were drawn.

        For callers that have something to do between steps; others take :meth:`events`. After an
        exception :meth:`abort` leaves a clean engine.
        """
        while self._waiting and len(self._running) < self.limits.max_num_seqs:
            self._start(self._waiting.pop(0))
        return self._step()

    def _start(self, run: Run) -> None:
        self._running.append(run)
        if self.repair is not None and run.division is not None:
            space = self._chunk_space(run.sequence.salt)
            self.repair.run(run.sequence, run.division, space, run.result.stats)

    def abort(self) -> None:
        """End every request: free its sequence, or roll a session's back to where its turn began."""
        for run in [*self._running, *self._waiting]:
            for one in [run, *run.siblings]:
                one.sample.finish_reason = one.sample.finish_reason or "cancelled"
            if run.keep:
                run.sequence.rollback(*run.begin)
            else:
                run.sequence.close()
        self._running.clear()
        self._waiting.clear()
        for result in [parked[0].run.result for parked in self._suspended.values()]:
            self.cancel(result)

    def _progress(self) -> tuple[int, int, int]:
        done = sum(min(run.sequence.store.length, run.prompt_end) for run in self._running)
        total = sum(run.prompt_end for run in self._running)
        return done, total, sum(len(run.sample.token_ids) for run in self._running)

    def _shares(self, runs: list[Run]) -> list[int]:
        generation = self.recipe.generation
        multiple = generation.chunk_multiple if generation is not None else 1
        block = self.recipe.compression.block if self.recipe.compression is not None else 0
        waiting = [(r.pending - r.divided, multiple, r.sequence.store.length + r.divided) for r in runs]
        return share(waiting, self.limits, block)

    def _step(self) -> list[Event]:
        packed = pack(self._running, self._shares(self._running))
        with torch.inference_mode():
            attention = StepAttention(packed.slices, self.model.slots, self.backend)
            ids_N, positions_N, rows_M, read_P = packed.tensors(self.model.device)
            logits_MV = self.model.forward(ids_N, positions_N, rows_M, attention, read_P)
            events: list[Event] = []
            row = 0
            for part, run in zip(packed.slices, packed.runs, strict=True):
                run.sequence.store.advance(part.last - part.first)
                if part.prompt and run.sequence.compression is not None:
                    run.sequence.compression.reserve(run.sequence.store)
                self._purity(run, part)
                if part.prompt and part.final:
                    self._prompt_done(run)
                elif part.prompt:
                    self._chunk_done(run)
                else:
                    self._decoded(run)
                if not part.final:
                    continue
                for one in [run, *self._fork(run)]:
                    events.append(self._draw(one, logits_MV[row]))
                row += 1
        return events

    def _purity(self, run: Run, part: Slice) -> None:
        """Extend the leading stretch that depends on the tokens and the generation alone."""
        sequence, count = run.sequence, part.last - part.first
        exact = part.prompt or (self.recipe.loading is None and self.recipe.generation is None)
        if self.recipe.generation is not None and self.recipe.generation.tail is None:
            exact = False
        if exact and sequence.pure == sequence.store.length - count:
            tail = (self.recipe.generation.tail or 0) if self.recipe.generation and part.prompt else 0
            sequence.pure = max(sequence.pure, min(sequence.store.length, len(sequence.tokens) - tail))

    def _prompt_done(self, run: Run) -> None:
        sequence = run.sequence
        self._give(sequence)
        compression = sequence.compression
        if compression is not None:
            compression.acted = sequence.store.length
            if compression.acts_on_turn(sequence.turns):
                self._compress(run, prompt=True)
        sequence.turns += 1

    def _chunk_done(self, run: Run) -> None:
        compression = run.sequence.compression
        if compression is None or not compression.at_border(run.sequence.store.length):
            return
        if compression.acts_on_turn(run.sequence.turns):
            self._give(run.sequence)
            self._compress(run, prompt=True)

    def _decoded(self, run: Run) -> None:
        compression = run.sequence.compression
        if compression is not None and compression.due(run.sequence.store.length):
            self._compress(run, prompt=False)

    def _compress(self, run: Run, *, prompt: bool) -> None:
        sequence = run.sequence
        assert sequence.compression is not None
        if prompt and sequence.probe and sequence.compression.recipe.needs.probe:
            probe(self.model, sequence, run.result.stats, self.backend)
        sequence.compression.act(sequence.store, self.model, run.result.stats)
        sequence.pure, sequence.compressed = 0, sequence.store.length

    def _fork(self, run: Run) -> list[Run]:
        """Give the waiting samples of a request a share of the prompt that was computed."""
        if not run.siblings:
            return []
        prompt, siblings = run.sequence, run.siblings
        run.siblings = []
        self._prompts.append(prompt)
        holder = Holder(lambda: self._end_prompt(prompt))
        for one in [run, *siblings]:
            one.sequence = self.new_sequence()
            one.sequence.share(holder, prompt)
            one.sequence.salt = prompt.salt
        self._running += siblings
        return siblings

    def _end_prompt(self, prompt: Sequence) -> None:
        self._prompts.remove(prompt)
        prompt.close()

    def _draw(self, run: Run, logits_V: torch.Tensor) -> Event:
        now = time.perf_counter()
        got = run.sample
        bent_V = logits_V if run.steer is None else run.steer(logits_V, got.token_ids)
        token = sample(bent_V, run.params, run.stream)
        if run.params.logprobs is not None and got.logprobs is not None:
            got.logprobs.append(logprob_record(logits_V, token, run.params.logprobs))
        stats = run.result.stats
        if not run.first_token_at:
            run.first_token_at = now
            if stats.time_to_first_token == 0.0:
                stats.time_to_first_token = now - run.submitted
        got.token_ids.append(token)
        run.sequence.tokens.append(token)
        stats.tokens_generated += 1
        ended = not run.params.ignore_eos and token in self.model.eos_token_ids
        text = "" if run.words is None or ended else run.words.push(token)
        text, stopped = run.until_stop(text)
        if ended or stopped:
            got.finish_reason = "stop"
        elif (
            len(got.token_ids) >= run.params.max_new_tokens
            or len(run.sequence.tokens) >= self.model.max_length
        ):
            got.finish_reason = "length"
        if got.finish_reason:
            if not stopped:
                tail = "" if run.words is None else run.words.finish()
                more, stopped = run.until_stop(tail)
                text += more + ("" if stopped else run.held)
            self._finish(run, now)
        got.text += text
        return Event(result=run.result, sample=got, token=token, text=text)

    # ------------------------------------------------------------------ ends

    def _finish(self, run: Run, now: float) -> None:
        stats = run.result.stats
        stats.decode_seconds = max(stats.decode_seconds, now - run.first_token_at)
        for kind, held in run.sequence.bytes_stored().items():
            stats.bytes_stored[kind] = stats.bytes_stored.get(kind, 0) + held
        self._running.remove(run)
        self._give(run.sequence)
        self._end_sequence(run)

    @staticmethod
    def _end_sequence(run: Run) -> None:
        if not run.keep:
            run.sequence.close()

    # ------------------------------------------------------------------ memory

    def bytes_of(self, tokens: int) -> int:
        """Most bytes that ``tokens`` new tokens of one sequence add, in whole memory pages."""
        model = self.model
        row = -(-tokens * model.head_dim * model.dtype.itemsize // PAGE) + 1
        return self._heads * (2 * row * PAGE + growth(self.recipe.compression, tokens))

    @property
    def _heads(self) -> int:
        """KV heads that store entries: layers may share them."""
        return (max(self.model.slots) + 1) * self.model.kv_heads

    def _fork_bytes(self, run: Run) -> int:
        """Bytes that the samples of a prompt take once it is computed: each keeps its own account of it."""
        each = self._heads * growth(self.recipe.compression, run.prompt_end)
        return (1 + len(run.siblings)) * each if run.siblings else 0

    def bytes_held(self) -> int:
        """Measured bytes of all requests' own entries; the pool's are not among them."""
        return sum(sequence.bytes_owned() for sequence in self._sequences())

    def bytes_stored(self) -> dict[str, int]:
        """The same by ``tier/codec``."""
        held: Counter[str] = Counter()
        for sequence in self._sequences():
            held.update(sequence.bytes_stored())
        del held["host/shared"]
        return dict(held)

    def bytes_promised(self) -> int:
        """Bytes that the requests hold once every prompt and one more token are computed."""
        runs = [*self._running, *self._waiting]
        return self.bytes_held() + sum(self.bytes_of(max(r.pending, 1)) + self._fork_bytes(r) for r in runs)

    def growth(self) -> int:
        """Most bytes that the next step adds."""
        chunks = [run.divided for run in self._waiting]
        forks = sum(self._fork_bytes(run) for run in [*self._running, *self._waiting])
        return forks + sum(self.bytes_of(count) for count in [*chunks, *self._next_shares()] if count)

    def chunks_coming(self) -> int:
        """Most bytes of chunks that the next step computes for its pool."""
        return sum(
            self.bytes_of_chunks(run.sequence.tokens, run.division, run.sequence.salt)
            for run in self._waiting
        )

    def bytes_of_division(self, division: Division | None) -> int:
        """Most bytes of all chunks of a prompt together."""
        if self.repair is None or division is None:
            return 0
        return sum(self.bytes_of(len(division.begin) + count) for count in division.lengths)

    def bytes_of_chunks(self, tokens: Seq[int], division: Division | None, salt: str = "") -> int:
        """Most bytes of the chunks of a prompt that the pool does not have now."""
        if self.repair is None or division is None:
            return 0
        missing = self.repair.missing(tokens, division, self._chunk_space(salt))
        return sum(self.bytes_of(count) for count in missing)

    def planned(self) -> int:
        """Tokens that the next step computes."""
        return sum(self._next_shares())

    def _next_shares(self) -> list[int]:
        room = max(self.limits.max_num_seqs - len(self._running), 0)
        return self._shares([*self._running, *self._waiting[:room]])

    def _sequences(self) -> list[Sequence]:
        return [*(run.sequence for run in [*self._running, *self._waiting]), *self._prompts]

    def suspend(self, result: Result, swap: Swap) -> None:
        """Send every sample of a request to a swap; it goes on after :meth:`resume` as if nothing had been.

        Parameters
        ----------
        result : Result
            A request that is running or waiting, and no session's.
        swap : Swap

        Raises
        ------
        winnow.store.files.StoreFileError
            No space or no permission there; a sample that is not there yet still runs.
        """
        for queue in (self._running, self._waiting):
            for run in [r for r in queue if r.result is result]:
                assert not run.keep, "a session's sequence belongs to its session"
                parked = run.sequence.suspend(swap)
                queue.remove(run)
                one = Suspended(run, parked, started=queue is self._running)
                self._suspended.setdefault(result.number, []).append(one)

    def bytes_suspended(self, result: Result) -> int:
        """Bytes that :meth:`resume` takes."""
        return sum(one.parked.bytes_back for one in self._suspended[result.number])

    def swapped(self) -> int:
        """Suspended requests of which some entries wait in host memory."""
        return sum(any(one.parked.tier == "swap" for one in of) for of in self._suspended.values())

    def resume(self, result: Result) -> None:
        """Bring a suspended request back; nothing is computed again.

        Raises
        ------
        winnow.store.files.StoreFileError
            A file is damaged; cancel the request.
        """
        waiting = self._suspended[result.number]
        while waiting:
            waiting[0].run.sequence.resume(waiting[0].parked, self.model)
            one = waiting.pop(0)
            (self._running if one.started else self._waiting).append(one.run)
        del self._suspended[result.number]

    # ------------------------------------------------------------------ reuse

    def reusable(self, tokens: Seq[int], salt: str = "") -> int:
        """Leading tokens that :meth:`submit` would find in the pool now."""
        if self.pool is None:
            return 0
        match = self._match(self.pool, tokens[: self._reusable(len(tokens)) + 1], salt)
        self.pool.release(match)
        return match.length

    def _namespace(self, salt: str) -> str:
        chunk = "" if self.recipe.generation is None else f"/{self.limits.max_num_batched_tokens}"
        codec = "" if self._codec == "raw" else f"/{self._codec}"
        return f"{self.model.fingerprint}/{self.recipe.generation_fingerprint()}{chunk}{codec}/{salt}"

    def _chunk_space(self, salt: str) -> str:
        return f"{self._namespace(salt)}/chunks"

    def _whole(self, tokens: int) -> int:
        """Tokens that end at a border of the generation's chunks: those alone are reusable."""
        generation = self.recipe.generation
        return (
            tokens if generation is None else tokens // generation.chunk_multiple * generation.chunk_multiple
        )

    def _reuse(self, sequence: Sequence, tokens: Seq[int], salt: str) -> None:
        if self.pool is None:
            return
        match = self._match(self.pool, tokens[: self._reusable(len(tokens)) + 1], salt)
        if match.length:
            sequence.borrow(match, self.pool)
        else:
            self.pool.release(match)

    def _reusable(self, tokens: int) -> int:
        """Most tokens of a prompt that may come from the pool.

        What a compression looks at must be computed: the queries that vote, before it first acts.
        """
        compression = self.recipe.compression
        if compression is None or compression.turns == "none":
            return tokens - 1
        acts = min(tokens, compression.block or tokens)
        return max(0, acts - max(1, compression.needs.window_queries))

    def _match(self, pool: Pool, tokens: Seq[int], salt: str) -> Match:
        namespace = self._namespace(salt)
        match = pool.match(tokens, namespace)
        if (whole := self._whole(match.length)) < match.length:
            pool.release(match)
            match = pool.match(tokens[: whole + 1], namespace)
        return match

    def _give(self, sequence: Sequence) -> None:
        """Copy into the pool what of a sequence depends on its tokens alone."""
        pure = self._whole(sequence.pure)
        if self.pool is None or pure == 0:
            return
        store = sequence.store
        layers = [store.segments(layer) for layer in range(store.layers)]
        self.pool.insert(sequence.tokens[:pure], self._namespace(sequence.salt), layers, self._codec)
