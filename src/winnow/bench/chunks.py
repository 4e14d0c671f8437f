"""Documents in chunks that come in another order each time: ``python -m winnow.bench.chunks --out FILE``.

Every document is cut between lines. Its chunks are asked about once in their own order, which fills the
pools, and is not counted; then in orders that are drawn, under full prefill and under each recipe.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from random import Random
from typing import Any

from winnow import api
from winnow.bench.machine import describe
from winnow.bench.output import save
from winnow.chunks import Chunks
from winnow.methods import load
from winnow.models.embedded import documents as docs
from winnow.recipe import Recipe

__all__ = ["RECIPES", "cut", "run"]

RECIPES: dict[str, Recipe] = {
    "full prefill": Recipe(),
    "no repair": load("cacheblend", recompute=(0,)),
    "CacheBlend": load("cacheblend"),
    "CacheBlend, 4 bits": load("cacheblend", codec="int4"),
}
TASKS: tuple[docs.Task, ...] = ("needles", "variables")


def cut(text: str, pieces: int) -> list[str]:
    """A text in at most so many pieces of about equal length, cut behind lines."""
    found, size = [""], len(text) / pieces
    for line in text.splitlines(keepends=True):
        if len(found[-1]) >= size:
            found.append("")
        found[-1] += line
    return found


def run(
    *, tokens: int = 1024, documents: int = 2, turns: int = 6, pieces: int = 4, seed: int = 1
) -> dict[str, Any]:
    """Ask the embedded model every question under every recipe.

    Parameters
    ----------
    tokens, documents : int
        Length of a document, and documents of each task.
    turns : int
        Questions for each document, each with an order of its own.
    pieces : int
        Chunks of a document.
    seed : int
        First seed, of those that training never sees.

    Returns
    -------
    dict
        ``config``, ``machine``, and per recipe a row: answers, tokens and scores by question, seconds to
        the first token (median and raw), and bytes of the pool when all was asked.
    """
    config = {"tokens": tokens, "documents": documents, "turns": turns, "pieces": pieces, "seed": seed}
    rows = []
    for name, recipe in RECIPES.items():
        llm = api.load("embedded", recipe=recipe)
        row: dict[str, Any] = {
            "name": name,
            "recipe": recipe.to_dict(),
            "questions": 0,
            "right": 0,
            "seconds": [],
        }
        counted = (
            "tokens_computed",
            "tokens_reused",
            "tokens_approximate",
            "tokens_repaired",
            "score_entries",
        )
        row |= dict.fromkeys(counted, 0)
        for number, task in enumerate(TASKS):
            for index in range(documents):
                of = seed + number * documents + index
                document = docs.make(task, tokens=tokens, seed=of, turns=turns, facts=24, hops=1)
                chunks, dice = cut(document.text, pieces), Random(f"winnow/chunks/{of}")
                llm.generate(Chunks([*chunks, "Q:"]), max_new_tokens=1)
                for turn in document.turns:
                    order = dice.sample(chunks, len(chunks))
                    result = llm.generate(Chunks([*order, f"Q: {turn.question} A:"]), max_new_tokens=16)
                    row["questions"] += 1
                    row["right"] += docs.score(turn, result.text.strip().split("\n")[0])
                    row["seconds"].append(result.stats.time_to_first_token)
                    for key in counted:
                        row[key] += getattr(result.stats, key)
        row["median_seconds"] = statistics.median(row["seconds"])
        row["bytes_pool"] = 0 if llm.engine.repair is None else llm.engine.repair.pool.bytes()
        rows.append(row)
    return {"what": __doc__, "config": config, "machine": describe(), "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, print a table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m winnow.bench.chunks", description=__doc__)
    for name, default in (("tokens", 1024), ("documents", 2), ("turns", 6), ("pieces", 4), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON with configuration, machine and raw samples")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    report = run(**given)
    print(
        f"{'':20} {'right':>8} {'first token':>12} {'approximate':>12} {'repaired':>9} {'scores':>12}"
        f" {'pool':>9}"
    )
    for row in report["rows"]:
        n = row["questions"]
        print(
            f"{row['name']:20} {row['right']:4}/{n:<3} {row['median_seconds'] * 1e3:9.0f} ms"
            f" {row['tokens_approximate'] / n:12.0f} {row['tokens_repaired'] / n:9.0f}"
            f" {row['score_entries'] / n / 1e6:10.2f} M {row['bytes_pool'] / 1e6:6.1f} MB"
        )
    if out is not None:
        save(report, out, depth=3)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
