"""The demo: questions over long documents, full attention beside recipes, one table.

Every figure of the table is counted or measured in the run that prints it: answers are checked
by exact match, bytes are those of live allocations and of entries that the kernels read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from winnow import api
from winnow.bench.machine import describe
from winnow.models.embedded import documents as docs

__all__ = ["RECIPES", "TASKS", "reading", "run", "table"]

# One that reads less, one that keeps less, and one that does something at all four stages.
RECIPES = ("sparse-read", "keep-128", "four-stages")

TASKS: dict[str, dict[str, Any]] = {
    "key-value": {"task": "key-value", "facts": 32},
    "needles": {"task": "needles", "facts": 32},
    "variables": {"task": "variables", "facts": 32, "hops": 1},
}

Progress = Callable[[str, int, int], None]


def run(
    *,
    tokens: int = 4096,
    documents: int = 2,
    turns: int = 6,
    recipes: tuple[str, ...] | list[str] | None = None,
    seed: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask every question under full attention and under each recipe.

    Parameters
    ----------
    tokens : int
        Length of each document.
    documents : int
        Documents per task.
    turns : int
        Questions per document, asked one after the other in one session.
    recipes : sequence of str or None
        Beside full attention, which always runs; None takes :data:`RECIPES`.
    seed : int
        First seed; seeds of the demo are never trained on.
    progress : callable or None
        Called with what runs, questions done, and questions in all.

    Returns
    -------
    dict
        Configuration, machine, and one row per contender; JSON-ready.
    """
    names = ["full attention", *(recipes if recipes is not None else RECIPES)]
    cases = [
        (task, docs.make(tokens=tokens, seed=seed + i, turns=turns, **options))
        for task, options in TASKS.items()
        for i in range(documents)
    ]
    total = len(names) * len(cases) * turns
    done = 0
    rows = []
    for name in names:
        llm = api.load("embedded", recipe=None if name == "full attention" else name)
        asked: list[dict[str, Any]] = []
        for task, document in cases:
            with llm.session() as session:
                for number, turn in enumerate(document.turns):
                    # The session holds what came before; a turn adds its own line only.
                    line = f"Q: {turn.question} A:"
                    result = session.generate(
                        document.text + line if number == 0 else line, max_new_tokens=24, stop=("\n",)
                    )
                    asked.append(
                        {
                            "task": task,
                            "seed": document.seed,
                            "turn": number + 1,
                            "right": docs.score(turn, result.text),
                            "stats": result.stats.to_dict(),
                        }
                    )
                    done += 1
                    if progress is not None:
                        progress(name, done, total)
        rows.append({"name": name, **_summary(asked), "recipe": llm.recipe.to_dict(), "asked": asked})
    return {
        "command": "winnow demo",
        "config": {"tokens": tokens, "documents": documents, "turns": turns, "seed": seed},
        "machine": describe(),
        "rows": rows,
    }


def _summary(asked: list[dict[str, Any]]) -> dict[str, Any]:
    first = [one for one in asked if one["turn"] == 1]
    later = [one for one in asked if one["turn"] > 1]

    def right(group: list[dict[str, Any]]) -> list[int]:
        return [sum(one["right"] for one in group), len(group)]

    def median(key: str, group: list[dict[str, Any]]) -> float:
        return float(statistics.median(one["stats"][key] for one in group))

    speeds = [one["stats"]["decode_tokens_per_second"] for one in asked if one["stats"]["decode_seconds"] > 0]
    return {
        "right": right(asked),
        "right_first_turn": right(first),
        "right_later_turns": right(later),
        "time_to_first_token": median("time_to_first_token", first),
        "decode_tokens_per_second": statistics.median(speeds) if speeds else 0.0,
        "bytes_stored": statistics.median(sum(one["stats"]["bytes_stored"].values()) for one in first),
        "bytes_read_per_token": median("bytes_read_per_token", asked),
        "score_entries": median("score_entries", first),
    }


def table(report: dict[str, Any]) -> Table:
    """The report as a table, beside full attention."""
    out = Table(
        "recipe",
        "right",
        "1st",
        "later",
        "first\ntoken",
        "tokens\nper s",
        "scores",
        "KV\nstored",
        "KV\nread",
        title=f"Documents of {report['config']['tokens']} tokens, {report['config']['turns']} questions each",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in out.columns:
        column.no_wrap = True
    base = report["rows"][0]
    for row in report["rows"]:
        share = ["{}/{}".format(*row[key]) for key in ("right", "right_first_turn", "right_later_turns")]
        out.add_row(
            row["name"],
            *share,
            f"{row['time_to_first_token'] * 1e3:.0f} ms",
            f"{row['decode_tokens_per_second']:.0f}",
            *(
                # The share stands below the size: nine columns then fit a terminal of 80.
                f"{_size(row[key], unit)}\n{row[key] / base[key]:.0%}" if base[key] else _size(row[key], unit)
                for key, unit in (("score_entries", ""), ("bytes_stored", "B"), ("bytes_read_per_token", "B"))
            ),
        )
    return out


def _size(count: float, unit: str) -> str:
    for prefix in ("", "K", "M", "G"):
        if count < 1000 or prefix == "G":
            return f"{count:.{0 if not prefix else 1}f} {prefix}{unit}".rstrip()
        count /= 1000
    raise AssertionError


def reading() -> str:
    """How to read the table."""
    return (
        "Exact match over free generation by the embedded model: all turns, first turns, later turns. "
        "First token, scores computed in the prefill and KV stored: median of first turns; tokens/s and KV "
        "read per token: median of all turns. Per cent: beside full attention in this run. A recipe that "
        "drops entries for the first question loses later ones; one that keeps all and reads sparsely "
        "does not."
    )
