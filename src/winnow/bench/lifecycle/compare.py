"""Two runs side by side: what changed for each system, and whether it is noise.

Quality and times are compared on the examples that both runs share (equal checksums), one
difference per example, with a sign-flip permutation test (exact for up to 14 examples) and a
bootstrap interval; p-values are adjusted after Holm over all comparisons of a kind. Bytes and score
entries are counted, not sampled: any difference of theirs is a change. Times are compared as
logarithms of ratios, and only where both runs tell of the same machine.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from winnow.bench.lifecycle.intervals import holm, paired

__all__ = ["compare", "load", "tables"]

SIGNIFICANT = 0.05

Sample = dict[str, Any]
Example = tuple[str, str, str]  # system, mode, checksum

#: counted measures: title, and the value of an example's samples
COUNTED: dict[str, Callable[[Sequence[Sample]], float | None]] = {
    "score entries": lambda turns: _sum(turns, "score_entries"),
    "KV stored": lambda turns: _last(turns)["bytes_stored"],
    "KV read": lambda turns: _sum(turns, "bytes_read"),
}

#: sampled measures: title, and the value of an example's samples; times are compared as ratios
TIMED: dict[str, Callable[[Sequence[Sample]], float | None]] = {
    "time to first token": lambda turns: sum(t["time_to_first_token"] for t in turns if t["turn"] <= 1),
    "decode time per token": lambda turns: _per_step(turns),
}

QUALITY: dict[str, Callable[[Sequence[Sample]], float | None]] = {
    "score, turn 1": lambda turns: _score(turns, first=True),
    "score, later turns": lambda turns: _score(turns, first=False),
}


def load(path: Path) -> dict[str, Any]:
    """Read a run's ``lifecycle.json``.

    Raises
    ------
    ValueError
        No such file, or not one of a lifecycle run.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; give the lifecycle.json of a run") from None
    if not isinstance(found, dict) or "samples" not in found:
        raise ValueError(f"{path} is no lifecycle run; give the lifecycle.json that one wrote")
    return found


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What changed from one run to another.

    Parameters
    ----------
    first, second : mapping
        As :func:`load` gives them.

    Returns
    -------
    dict
        ``rows`` (one for each system, mode and measure), and ``notes`` for people.

    Raises
    ------
    ValueError
        The runs share no example.
    """
    before, after = _examples(first), _examples(second)
    shared = [key for key in before if key in after]
    if not shared:
        raise ValueError(
            "the runs share no example of a system; run both with the same tasks, lengths, turns and seed"
        )
    same_machine = first["machine"].get("cpu") == second["machine"].get("cpu") and first["machine"].get(
        "cores"
    ) == second["machine"].get("cores")
    groups: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for key in shared:
        groups[key[:2]].append(key)
    rows: list[dict[str, Any]] = []
    for measures, kind in ((QUALITY, "quality"), (TIMED, "time"), (COUNTED, "count")):
        if kind == "time" and not same_machine:
            continue
        part = []
        for (system, mode), keys in groups.items():
            for title, value in measures.items():
                pairs = [(value(before[key]), value(after[key])) for key in keys]
                known = [(a, b) for a, b in pairs if a is not None and b is not None]
                if known:
                    told = _counted(known) if kind == "count" else _sampled(known, kind)
                    part.append({"system": system, "mode": mode, "measure": title, "kind": kind, **told})
        if kind != "count":
            _judge(part, kind)
        rows += part
    return {
        "first": _about(first),
        "second": _about(second),
        "rows": rows,
        "notes": _notes(first, second, before, after, shared, same_machine),
    }


def _examples(run: Mapping[str, Any]) -> dict[Example, list[Sample]]:
    columns = run["samples"]["columns"]
    found: dict[Example, list[Sample]] = defaultdict(list)
    for row in run["samples"]["rows"]:
        sample = dict(zip(columns, row, strict=True))
        found[sample["system"], sample["mode"], sample["checksum"]].append(sample)
    return found


def _sum(turns: Sequence[Sample], name: str) -> float | None:
    values = [turn[name] for turn in turns]
    return None if None in values else float(sum(values))


def _last(turns: Sequence[Sample]) -> Sample:
    return max(turns, key=lambda turn: int(turn["turn"]))


def _per_step(turns: Sequence[Sample]) -> float | None:
    steps = sum(max(turn["tokens_generated"] - 1, 0) for turn in turns)
    seconds = sum(turn["decode_seconds"] for turn in turns if turn["tokens_generated"] > 1)
    return seconds / steps if steps else None


def _score(turns: Sequence[Sample], *, first: bool) -> float | None:
    scores = [t["score"] for t in turns if t["score"] is not None and (t["turn"] == 1) == first]
    return statistics.fmean(scores) if scores else None


def _counted(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    first, second = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    changed = sum(a != b for a, b in pairs)
    return {
        "first": first,
        "second": second,
        "examples": len(pairs),
        "changed": changed,
        "verdict": "same" if not changed else "less" if second < first else "more",
    }


def _sampled(pairs: Sequence[tuple[float, float]], kind: str) -> dict[str, Any]:
    if kind == "time":
        told = paired([math.log(b / a) for a, b in pairs])
        first, second = (statistics.median(values) for values in zip(*pairs, strict=True))
        change = [math.exp(x) - 1 for x in (told.difference, told.low, told.high)]
    else:
        told = paired([b - a for a, b in pairs])
        first, second = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        change = [told.difference, told.low, told.high]
    return {
        "first": first,
        "second": second,
        "examples": told.examples,
        "change": change[0],
        "low": change[1],
        "high": change[2],
        "p": told.p,
        "least_p": told.least_p,
    }


def _judge(rows: Sequence[dict[str, Any]], kind: str) -> None:
    """Verdicts after Holm's adjustment over these rows."""
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_adjusted"] = adjusted
        if adjusted < SIGNIFICANT:
            better = (row["change"] > 0) == (kind == "quality")
            row["verdict"] = "better" if better else "worse"
        elif row["least_p"] * len(rows) >= SIGNIFICANT and row["change"]:
            row["verdict"] = "too few"
        else:
            row["verdict"] = "noise" if row["change"] else "same"


def _about(run: Mapping[str, Any]) -> dict[str, Any]:
    machine = run["machine"]
    return {
        "fingerprint": run["fingerprint"],
        "commit": machine.get("commit"),
        "time": machine.get("time"),
        "cpu": machine.get("cpu", {}).get("name"),
    }


def _notes(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    before: Mapping[Example, Any],
    after: Mapping[Example, Any],
    shared: Sequence[Example],
    same_machine: bool,
) -> list[str]:
    out = [
        " against ".join(
            f"{run['machine'].get('commit') or run['fingerprint']} ({run['machine'].get('time')})"
            for run in (first, second)
        ),
        f"{len(shared)} examples are shared; {len(before) - len(shared)} are in the first run only, "
        f"{len(after) - len(shared)} in the second only.",
        "Quality and times: one difference per example, sign-flip permutation test (exact for up to 14 "
        "examples), p-values after Holm over all rows of a kind; intervals: 95 % bootstrap over examples. "
        "Counts are exact: any difference is a change. 'Too few': no result of so many examples could tell.",
    ]
    if not same_machine:
        out.append("The runs were made on different machines: their times are not compared.")
    if first["machine"].get("threads") != second["machine"].get("threads"):
        out.append("The runs used different numbers of threads.")
    return out


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """One table for each system and mode; rows without any change in dim type."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in report["rows"]:
        groups[f"{row['system']}, {row['mode']}"].append(row)
    colours = {"better": "green", "worse": "red", "less": "green", "more": "yellow"}
    for group, rows in groups.items():
        out = Table(title=group, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        out.add_column("", no_wrap=True, min_width=21)
        for name, width in (("first", 9), ("second", 9), ("change", 14), ("p", 5), ("", 9)):
            out.add_column(name, justify="right", no_wrap=True, min_width=width)
        for row in rows:
            verdict = row["verdict"]
            out.add_row(
                row["measure"],
                *(_value(row, row[name]) for name in ("first", "second")),
                _change(row),
                f"{row['p_adjusted']:.3f}" if "p_adjusted" in row else "",
                f"[{colours[verdict]}]{verdict}[/]" if verdict in colours else verdict,
                style="dim" if verdict in ("same", "noise") else None,
            )
        yield out


def _value(row: Mapping[str, Any], value: float) -> str:
    if row["kind"] == "quality":
        return f"{value:.0%}"
    if row["kind"] == "time":
        return f"{value * 1e3:.1f} ms"
    return f"{value / 1e6:.2f} M"


def _change(row: Mapping[str, Any]) -> str:
    if row["kind"] == "count":
        return f"{row['second'] / row['first'] - 1:+.1%}" if row["first"] else ""
    unit = " points" if row["kind"] == "quality" else " %"
    return f"{100 * row['change']:+.1f}{unit}\n{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
