"""``winnow bench workers``: several workers on one cache (Hogwild! Inference), beside separate sequences.

A text lies in the cache when decoding begins. It is read by one sequence, by several that hold a copy each,
by several samples of one prompt (one copy, and no sight of each other), and by workers that share it and
read each other. Contenders take turns. On the embedded model answers count as well: workers are asked
different questions about one document, and one is asked for a fact that only another was given.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import Tensor

from winnow import api
from winnow.bench.lifecycle.intervals import interval
from winnow.bench.machine import describe, read_seconds
from winnow.engine.request import SamplingParams
from winnow.engine.sequence import Holder
from winnow.engine.sequence import Sequence as Cached
from winnow.engine.shared_blocks import Block, View, forward
from winnow.engine.workers import Crew, Hogwild
from winnow.kernels.backend import extension
from winnow.models.embedded import documents as docs
from winnow.models.random import random_model
from winnow.store.sequence import SequenceStore

__all__ = ["COUNTS", "run", "tables"]

Progress = Callable[[str, int, int], None]

COUNTS = (1, 2, 4)
"""Readers of one text."""

_QUESTIONS = max(COUNTS)  # per document
_ANSWER = 16  # tokens at most
_TOLD = {
    "a fact that nobody was told": None,
    "a fact that the other reads in the same pass": 0,
    "a fact that the other read before": 1,
}


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Tokens and their entries, per layer K and V ``[S, H, D]``."""

    tokens: list[int]
    layers: list[tuple[Tensor, Tensor]]

    def into(self, store: SequenceStore) -> None:
        """Append everything to an empty store."""
        positions = torch.arange(len(self.tokens), dtype=torch.int32)
        for layer, (k_SHD, v_SHD) in enumerate(self.layers):
            store.append(layer, k_SHD, v_SHD, positions)
        store.advance(len(self.tokens))


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What decoding some tokens took; a step gives each reader one."""

    seconds: float
    steps: int
    bytes_stored: int
    bytes_read: int


class _Contender(Protocol):
    """Several readers of one text."""

    def decode(self, steps: int) -> _Round:
        """Decode so many tokens per reader, always from the end of the text on."""
        ...


class _Copies:
    """Sequences in one packed batch, each with its own copy of the text."""

    def __init__(self, llm: api.LLM, text: _Text, readers: int) -> None:
        self._llm = llm
        self._held = [_cached(llm, text) for _ in range(readers)]

    def decode(self, steps: int) -> _Round:
        length, turns = self._held[0].store.length, self._held[0].turns
        seconds, read = _packed(self._llm, self._held, steps)
        stored = sum(one.bytes_owned() for one in self._held)
        for one in self._held:
            one.rollback(length, length, turns)
        return _Round(seconds=seconds, steps=steps, bytes_stored=stored, bytes_read=read)


class _Samples:
    """Sequences in one packed batch that read one copy of the text, as samples of one prompt do."""

    def __init__(self, llm: api.LLM, text: _Text, readers: int) -> None:
        self._llm, self._readers = llm, readers
        self._text = _cached(llm, text)

    def decode(self, steps: int) -> _Round:
        own = [self._llm.engine.new_sequence() for _ in range(self._readers)]
        for one in own:
            one.share(Holder(lambda: None), self._text)
        seconds, read = _packed(self._llm, own, steps)
        stored = sum(one.bytes_owned() for one in [self._text, *own])
        for one in own:
            one.close()
        return _Round(seconds=seconds, steps=steps, bytes_stored=stored, bytes_read=read)


class _Workers:
    """Workers that share the text and see what the others write."""

    def __init__(self, llm: api.LLM, text: _Text, readers: int) -> None:
        self._llm, self._text = llm, text
        self._how = Hogwild(names=("",) * readers, header="", step_end="")

    def decode(self, steps: int) -> _Round:
        with Crew(self._how, self._llm.model, lambda _: [], lambda _: "") as crew:
            self._text.into(crew.common.store)
            crew.common.tokens = list(self._text.tokens)
            result = crew.run([1], SamplingParams(max_new_tokens=steps, ignore_eos=True))
        assert result.steps == steps
        return _Round(
            seconds=result.seconds,
            steps=steps,
            bytes_stored=result.bytes_stored,
            bytes_read=result.bytes_read,
        )


def _cached(llm: api.LLM, text: _Text) -> Cached:
    sequence = llm.engine.new_sequence()
    text.into(sequence.store)
    sequence.tokens = list(text.tokens)
    return sequence


def _packed(llm: api.LLM, sequences: Sequence[Cached], steps: int) -> tuple[float, int]:
    """Let all sequences go on together: seconds of so many steps, and bytes read."""
    params = SamplingParams(max_new_tokens=steps + 1, ignore_eos=True)
    results = [llm.engine.submit([1], params, sequence=one) for one in sequences]
    for _ in llm.engine.events():
        pass
    read = sum(sum(result.stats.bytes_read.values()) for result in results)
    return max(result.stats.decode_seconds for result in results), read


def run(
    *,
    model: str = "embedded",
    entries: int = 4096,
    steps: int = 16,
    rounds: int = 5,
    documents: int = 26,
    tokens: int = 1024,
    seed: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the contenders, interleaved; on the embedded model also ask workers questions.

    Parameters
    ----------
    model : str
        ``embedded``, or a preset of :func:`winnow.models.random.random_model`, which is timed only.
    entries : int
        Length of the text that all readers have.
    steps, rounds : int
        Decoded tokens per reader and round, and rounds.
    documents, tokens : int
        Documents that are asked about, with one question for each of the largest number of workers,
        and their length.
    seed : int
        First seed of the documents, of those that training never sees.
    progress : callable or None

    Returns
    -------
    dict
        Configuration, machine, ``limit`` (of a random model: seconds to read weights and text once), a row
        per contender with raw rounds, and ``quality`` (of the embedded model).
    """
    if min(entries, steps, rounds) < 1:
        raise ValueError("entries, steps and rounds must be at least 1")
    tell = progress or (lambda what, done, total: None)
    module = None if model == "embedded" else random_model(model)
    llm = api.load(model if module is None else module)
    text = _computed(llm, entries, seed) if module is None else _random(module.config, entries)
    made: dict[tuple[str, int], _Contender] = {}
    for readers in COUNTS:
        made["sequences", readers] = _Copies(llm, text, readers)
        if readers > 1:
            made["samples of one prompt", readers] = _Samples(llm, text, readers)
        made["workers", readers] = _Workers(llm, text, readers)
    samples: dict[tuple[str, int], list[_Round]] = {key: [] for key in made}
    for number in range(-1, rounds):  # the first is not counted: it touches memory for the first time
        for key, contender in made.items():
            tell(f"{key[1]} {key[0]}", number + 1, rounds + 1)
            if number < 0:
                contender.decode(1)
            else:
                samples[key].append(contender.decode(steps))
    return {
        "command": "winnow bench workers",
        "config": {
            "model": model,
            "entries": entries,
            "steps": steps,
            "rounds": rounds,
            "documents": documents,
            "tokens": tokens,
            "seed": seed,
        },
        "machine": describe(),
        "limit": None if module is None else _limit(module, text),
        "rows": [_row(key, samples) for key in made],
        "quality": _quality(llm, documents, tokens, seed, tell) if module is None and documents else None,
    }


def _computed(llm: api.LLM, entries: int, seed: int) -> _Text:
    """A document and what a prefill makes of it."""
    tokens = llm.tokens(docs.make("needles", tokens=entries, seed=seed).text)
    sequence = llm.engine.new_sequence()
    try:
        llm.engine.submit(tokens, SamplingParams(max_new_tokens=1, ignore_eos=True), sequence=sequence)
        for _ in llm.engine.events():
            pass
        held = [sequence.store.decoded(layer) for layer in range(sequence.store.layers)]
        layers = [
            (one.k[:, : len(tokens)].transpose(0, 1).clone(), one.v[:, : len(tokens)].transpose(0, 1).clone())
            for one in held
        ]
    finally:
        sequence.close()
    return _Text(tokens=tokens, layers=layers)


def _random(config: Any, entries: int) -> _Text:
    """Random entries, the same in every layer: what is timed does not depend on them."""
    shape, generator = (entries, config.num_key_value_heads, config.head_dim), torch.Generator()
    generator.manual_seed(0)
    k, v = (torch.empty(shape, dtype=config.dtype).normal_(generator=generator) for _ in range(2))
    return _Text(tokens=[1] * entries, layers=[(k, v)] * config.num_hidden_layers)


def _limit(module: torch.nn.Module, text: _Text) -> dict[str, Any] | None:
    """Seconds to read all weights and the text's entries once."""
    if extension() is None:
        return None
    tensors = [*module.parameters(), *(x for pair in text.layers for x in pair)]
    held = [x.detach() for x in tensors]
    samples = [read_seconds(*held) for _ in range(4)][1:]
    return {
        "bytes": sum(x.nbytes for x in held),
        "seconds": statistics.median(samples),
        "samples": samples,
    }


def _row(key: tuple[str, int], samples: dict[tuple[str, int], list[_Round]]) -> dict[str, Any]:
    name, readers = key
    own, alone = samples[key], samples["sequences", 1]
    step = statistics.median(one.seconds / one.steps for one in own)
    # Tokens per second of all readers together, over those of one sequence in the same round.
    gains = [readers * base.seconds / one.seconds for one, base in zip(own, alone, strict=True)]
    return {
        "name": name,
        "readers": readers,
        "step_seconds": step,
        "tokens_per_second": readers / step,
        "over_one": statistics.median(gains),
        "bytes_stored": own[-1].bytes_stored,
        "bytes_read_per_token": own[-1].bytes_read / (readers * own[-1].steps),
        "samples": [asdict(one) for one in own],
    }


# ---------------------------------------------------------------------- answers


def _quality(llm: api.LLM, documents: int, tokens: int, seed: int, tell: Progress) -> list[dict[str, Any]]:
    """Answers by kind of question and number of workers, with intervals over documents."""
    right: dict[tuple[str, int], list[list[float]]] = {}
    for number in range(documents):
        tell("questions", number, documents)
        document = docs.make("needles", tokens=tokens, seed=seed + number, turns=_QUESTIONS)
        for workers in COUNTS:
            answers = [
                answer
                for first in range(0, _QUESTIONS, workers)
                for answer in _ask(llm, document.text, document.turns[first : first + workers])
            ]
            right.setdefault(("own questions", workers), []).append(answers)
        for kind, when in _TOLD.items():
            told = [_told(llm, document, turn, when) for turn in document.turns]
            right.setdefault((kind, 2), []).append(told)
    return [
        {"kind": kind, "workers": workers, "right": interval(of).to_dict(), "samples": of}
        for (kind, workers), of in right.items()
    ]


def _ask(llm: api.LLM, text: str, turns: Sequence[docs.Turn]) -> list[float]:
    """Whether each worker answers its question right."""
    headers = tuple(f"Q: {turn.question} A:" for turn in turns)
    how = Hogwild(names=headers, header="{name}", step_end="")
    texts = llm.workers(text, how, max_new_tokens=_ANSWER).texts
    return [float(docs.score(turn, got)) for turn, got in zip(turns, texts, strict=True)]


def _told(llm: api.LLM, document: docs.Document, turn: docs.Turn, when: int | None) -> float:
    """Ask for a fact whose line was moved from the document to another worker.

    That reads it ``when`` passes before the question is read, or never.
    """
    first, last = turn.sources[0]
    rest, line = document.text[:first] + document.text[last + 1 :], document.text[first : last + 1]
    model, common, theirs, own = llm.model, *(Block(llm.model) for _ in range(3))
    asked, other = View([common, theirs, own]), View([common, own, theirs])
    written = llm.tokens(line, special=False)
    question, out = llm.tokens(f"Q: {turn.question} A:", special=False), list[int]()
    try:
        forward(model, [View([common])], [llm.tokens(rest)])
        if when == 1:
            forward(model, [other], [written])
        both = ([asked, other], [question, written]) if when == 0 else ([asked], [question])
        logits_V = forward(model, *both)[0]
        while len(out) < _ANSWER:
            out.append(int(logits_V.argmax()))
            if out[-1] in model.eos_token_ids:
                break
            logits_V = forward(model, [asked], [out[-1:]])[0]
    finally:
        for block in (common, theirs, own):
            block.store.close()
    assert llm.text is not None, "the embedded model has a tokenizer"
    return float(docs.score(turn, llm.text.decode(out)))


# ---------------------------------------------------------------------- tables


def tables(report: dict[str, Any]) -> list[Table]:
    """Speed, and where it was asked for quality."""
    config = report["config"]
    speed = Table(
        "readers",
        "",
        "tokens/s",
        "per reader",
        "x one",
        "MiB stored",
        "MiB read\nper token",
        title=f"{config['entries']} shared entries, model {config['model']}",
    )
    for row in report["rows"]:
        speed.add_row(
            str(row["readers"]),
            row["name"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second'] / row['readers']:.1f}",
            f"{row['over_one']:.2f}",
            f"{row['bytes_stored'] / 2**20:.1f}",
            f"{row['bytes_read_per_token'] / 2**20:.1f}",
        )
    if report["limit"] is not None:
        limit = 1 / report["limit"]["seconds"]
        speed.add_row("1", "reading weights and text once", f"{limit:.1f}", f"{limit:.1f}", "", "", "")
    if report["quality"] is None:
        return [speed]
    quality = Table("workers", "asked", "right", title=f"Documents of {config['tokens']} tokens")
    for row in report["quality"]:
        share = "{mean:.0%} ({low:.0%} to {high:.0%})".format(**row["right"])
        quality.add_row(str(row["workers"]), row["kind"], share)
    return [speed, quality]
