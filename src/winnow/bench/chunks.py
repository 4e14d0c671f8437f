"""``winnow bench chunks``: prompts from chunks that come in another order each time.

Every document is cut between lines. Its chunks are asked about once in their own order, which fills the
pools, and is not counted; then in orders that are drawn. Contenders take turns at every question. On the
embedded model the answers count; a random model (``1b``) shows what a large one would save in time.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from random import Random
from typing import Any

from rich.table import Table

from winnow import api
from winnow.bench.lifecycle.intervals import interval
from winnow.bench.machine import describe
from winnow.chunks import Chunks
from winnow.engine.request import Result, Stats
from winnow.engine.scheduler import Limits
from winnow.methods import load
from winnow.models.embedded import documents as docs
from winnow.models.random import random_model
from winnow.recipe import Recipe

__all__ = ["CONTENDERS", "GROUPS", "Case", "cut", "embedded_cases", "random_cases", "run", "table"]

Progress = Callable[[str, int, int], None]
Piece = str | list[int]

FULL = "full recompute"
CONTENDERS: dict[str, Recipe] = {
    FULL: Recipe(),
    "prefix reuse": load("prefix-reuse"),
    "chunks, no repair": load("cacheblend", recompute=(0,)),
    "CacheBlend 5 %": load("cacheblend", recompute=(5,)),
    "CacheBlend 15 %": load("cacheblend", recompute=(15,)),
    "CacheBlend 50 %": load("cacheblend", recompute=(50,)),
    "CacheBlend 15 %, 8 bits": load("cacheblend", recompute=(15,), codec="int8"),
    "CacheBlend 15 %, 4 bits": load("cacheblend", recompute=(15,), codec="int4"),
}
GROUPS: dict[docs.Task, str] = {
    "needles": "one line",
    "variables": "lines of two chunks",
    "joint-recall": "line whose heading stands in another chunk",
}
"""What an answer rests on. The last kind needs attention between chunks while they are read."""

_FACTS, _QUESTION = 24, 32
_COUNTED = (
    "tokens_computed",
    "tokens_reused",
    "tokens_approximate",
    "tokens_repaired",
    "score_entries",
    "bytes_read_per_token",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One document and its questions.

    Attributes
    ----------
    group : str
    units : list of list of (str or list of int)
        Chunks; those of one unit keep their order, units change theirs.
    last : str or list of int
        What follows the chunks when the pools are filled.
    asks : list of (str or list of int, docs.Turn or None)
        What follows them when it counts, and how the answer is judged.
    """

    group: str
    units: list[list[Piece]]
    last: Piece
    asks: list[tuple[Piece, docs.Turn | None]]


def cut(text: str, pieces: int) -> list[str]:
    """A text in at most so many pieces of about equal length, cut behind lines."""
    found, size = [""], len(text) / pieces
    for line in text.splitlines(keepends=True):
        if len(found[-1]) >= size:
            found.append("")
        found[-1] += line
    return found


def _sections(text: str) -> list[str]:
    """The sections of joint recall, each with the heading that opens it."""
    found: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("context "):
            found.append("")
        found[-1] += line
    return found


def _apart(turn: docs.Turn, ends: list[int]) -> bool:
    """Whether the lines on which an answer rests lie in different chunks, which end at these characters."""
    return len({bisect_right(ends, first) for first, _ in turn.sources}) > 1


def embedded_cases(*, tokens: int, pieces: int, questions: int, turns: int, seed: int) -> Iterator[Case]:
    """Documents of the embedded model, at least ``questions`` questions of each group."""
    for task, group in GROUPS.items():
        asked = 0
        while asked < questions:
            document = docs.make(
                task, tokens=tokens, seed=seed, turns=_FACTS // 2, facts=_FACTS, hops=1, contexts=pieces // 2
            )
            seed += 1
            if task == "joint-recall":
                units = [cut(section, 2) for section in _sections(document.text)]
            else:
                units = [[piece] for piece in cut(document.text, pieces)]
            ends = list(accumulate(map(len, chain.from_iterable(units))))
            wanted = [turn for turn in document.turns if task == "needles" or _apart(turn, ends)][:turns]
            if wanted:
                asked += len(wanted)
                asks: list[tuple[Piece, docs.Turn | None]] = [
                    (f"Q: {turn.question} A:", turn) for turn in wanted
                ]
                yield Case(group=group, units=[list(unit) for unit in units], last="Q:", asks=asks)


def random_cases(*, vocabulary: int, tokens: int, pieces: int, questions: int, seed: int) -> Iterator[Case]:
    """One document of random tokens and so many questions about it, for timing."""
    dice = Random(seed)

    def draw(n: int) -> list[int]:
        return [dice.randrange(vocabulary) for _ in range(n)]

    units: list[list[Piece]] = [[draw(tokens // pieces)] for _ in range(pieces)]
    yield Case(
        group="", units=units, last=draw(_QUESTION), asks=[(draw(_QUESTION), None) for _ in range(questions)]
    )


def run(
    *,
    model: str = "embedded",
    contenders: list[str] | None = None,
    tokens: int = 1024,
    pieces: int = 8,
    questions: int = 60,
    turns: int = 6,
    seed: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask every question under every contender.

    Parameters
    ----------
    model : str
        ``embedded``, or a preset of :func:`winnow.models.random.random_model`, whose answers say nothing.
    contenders : list of str or None
        Names of :data:`CONTENDERS` beside the full recompute; None takes all.
    tokens, pieces : int
        Length of a document, and its chunks.
    questions : int
        At least so many of each of :data:`GROUPS`; of a random model, orders of its one document.
    turns : int
        Most questions for each document, each with an order of its own.
    seed : int
        First seed, of those that training never sees.
    progress : callable or None

    Returns
    -------
    dict
        Configuration, machine, and a row per contender: right answers by group with bootstrap intervals
        over documents, time to the first token (raw, median, and median share of the full recompute's for
        the same prompt), means per question of what was computed and read, and bytes of the pool.
    """
    chosen = list(CONTENDERS) if contenders is None else [FULL, *contenders]
    for name in chosen:
        if name not in CONTENDERS:
            raise ValueError(f"unknown contender {name!r}; there are {', '.join(CONTENDERS)}")
    if pieces < 4 or tokens < pieces or min(questions, turns) < 1:
        raise ValueError("give at least 4 pieces, as many tokens, one question and one turn")
    tell = progress or (lambda what, done, total: None)
    sizes = {"tokens": tokens, "pieces": pieces, "questions": questions, "seed": seed}
    if model == "embedded":
        base = api.load(model)
        cases = list(embedded_cases(turns=turns, **sizes))
    else:
        base = api.load(random_model(model))
        cases = list(random_cases(vocabulary=base.model.vocab_size, **sizes))
    llms = {name: _contender(base, CONTENDERS[name]) for name in chosen}
    fillers = _share_pools(llms)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for number, case in enumerate(cases):
        for name in fillers:
            tell(f"{name}: filling the pool", number, len(cases))
            _fill(llms[name], case)
        dice = Random(f"winnow/chunks/{seed}/{number}")
        for last, turn in case.asks:
            prompt = Chunks([*chain.from_iterable(dice.sample(case.units, len(case.units))), last])
            for name, llm in llms.items():
                tell(name, number, len(cases))
                result = llm.generate(prompt, max_new_tokens=16 if turn else 4)
                samples[name].append({"group": case.group, "document": number, **_sample(result, turn)})
    chunk_tokens = sum(len(base.tokens(chunk, special=False)) for case in cases for chunk in _flat(case))
    return {
        "command": "winnow bench chunks",
        "config": {"model": model, "contender": chosen[1:], "turns": turns, **sizes},
        "machine": describe(),
        "chunk_tokens": chunk_tokens,
        "rows": [_row(name, llms[name], samples) for name in chosen],
    }


def _flat(case: Case) -> Iterator[Piece]:
    return chain.from_iterable(case.units)


def _fill(llm: api.LLM, case: Case) -> None:
    """Let the pool meet every chunk, also in front of a prompt, where it stands behind no begin token."""
    llm.generate(Chunks([*_flat(case), case.last]), max_new_tokens=1)
    if llm.text is not None:
        for unit in case.units:
            llm.generate(Chunks([unit[0], unit[0], case.last]), max_new_tokens=1)


def _contender(base: api.LLM, recipe: Recipe) -> api.LLM:
    return api.LLM(base.model, base.text, recipe, Limits(), "auto")


def _share_pools(llms: dict[str, api.LLM]) -> list[str]:
    """Give contenders whose chunks are stored alike one pool; the names of those that have to fill theirs.

    What is stored of a chunk does not depend on how much of it is computed again later.
    """
    fillers: dict[str, str] = {}
    for name, llm in llms.items():
        repair = llm.engine.repair
        if repair is None:
            if llm.engine.pool is not None:
                fillers[name] = name
        elif repair.part.codec in fillers:
            first = llms[fillers[repair.part.codec]].engine.repair
            assert first is not None
            repair.pool = first.pool
        else:
            fillers[repair.part.codec] = name
    return list(fillers.values())


def _sample(result: Result, turn: docs.Turn | None) -> dict[str, Any]:
    stats: Stats = result.stats
    return {
        "right": None if turn is None else docs.score(turn, result.text),
        "seconds": round(stats.time_to_first_token, 6),
        "bytes_stored": sum(stats.bytes_stored.values()),
        **{key: getattr(stats, key) for key in _COUNTED},
    }


def _row(name: str, llm: api.LLM, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    own, full = samples[name], samples[FULL]
    seconds = [one["seconds"] for one in own]
    shares = [one["seconds"] / base["seconds"] for one, base in zip(own, full, strict=True)]
    engine = llm.engine
    pool = engine.repair.pool if engine.repair is not None else engine.pool
    return {
        "name": name,
        "recipe": llm.recipe.to_dict(),
        "right": _right(own),
        "median_seconds": statistics.median(seconds),
        "over_full": statistics.median(shares),
        **{key: statistics.fmean(one[key] for one in own) for key in (*_COUNTED, "bytes_stored")},
        "bytes_pool": 0 if pool is None else pool.bytes(),
        "samples": {key: [one[key] for one in own] for key in own[0]},
    }


def _right(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """By group: share of right answers and its interval over documents."""
    groups: dict[str, dict[int, list[float]]] = {}
    for one in samples:
        if one["right"] is not None:
            groups.setdefault(one["group"], {}).setdefault(one["document"], []).append(float(one["right"]))
    return {group: interval(list(of.values())).to_dict() for group, of in groups.items()}


def table(report: dict[str, Any]) -> Table:
    """The report as a table."""
    config, groups = report["config"], list(report["rows"][0]["right"])
    out = Table(
        "contender",
        *(f"right:\n{group}" for group in groups),
        "first token",
        "x full",
        "computed",
        "repaired",
        "scores",
        "read per\ntoken",
        "pool, KiB\nper token",
        title="{pieces} chunks of a document of {tokens} tokens, model {model}".format(**config),
    )
    for row in report["rows"]:
        out.add_row(
            row["name"],
            *("{mean:.0%} ({low:.0%} to {high:.0%})".format(**row["right"][group]) for group in groups),
            f"{row['median_seconds'] * 1e3:.0f} ms",
            f"{row['over_full']:.2f}",
            f"{row['tokens_computed']:.0f}",
            f"{row['tokens_repaired']:.0f}",
            f"{row['score_entries'] / 1e6:.2f} M",
            f"{row['bytes_read_per_token'] / 2**20:.1f} MiB",
            f"{row['bytes_pool'] / report['chunk_tokens'] / 1024:.1f}" if row["bytes_pool"] else "",
        )
    return out
