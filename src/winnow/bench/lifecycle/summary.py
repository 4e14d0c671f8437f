"""From the records of a run to one JSON document: scores with intervals, costs beside the baseline's."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from winnow.bench.lifecycle.config import BASELINE, Config
from winnow.bench.lifecycle.intervals import holm, interval, paired
from winnow.bench.lifecycle.record import ExampleRecord, TurnRecord

__all__ = ["COLUMNS", "DEPTHS", "cost", "rows", "scores", "summarise"]

DEPTHS = 5
"""Depths are put together into so many bins."""

Records = Sequence[ExampleRecord]


def summarise(
    config: Config,
    systems: Sequence[Mapping[str, Any]],
    sessions: Sequence[Mapping[str, Any]],
    seconds: float,
    records: Records,
    failures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The whole run as plain data.

    Parameters
    ----------
    config : Config
    systems : sequence of mapping
        ``name``, ``kind``, ``recipe`` (YAML or None), ``missing`` (reason or None) and ``about``.
    sessions : sequence of mapping
        The machine of every start and resumption of the run.
    seconds : float
        From starts to ends; a sitting that was killed has no end and does not count.
    records : sequence of ExampleRecord
    failures : sequence of mapping
        Examples that a system refused, with its error.
    """
    table = []
    for mode in config.modes:
        base = [r for r in records if r.mode == mode and r.system == BASELINE]
        for system in systems:
            mine = [r for r in records if r.mode == mode and r.system == system["name"]]
            if mine:
                nominal = system.get("about", {}).get("nominal")
                table.append({"system": system["name"], "mode": mode, **_row(mine, base, nominal)})
    return {
        "command": "winnow bench lifecycle",
        "config": config.to_dict(),
        "fingerprint": config.fingerprint,
        "machine": sessions[-1],
        "sessions": list(sessions),
        "seconds": seconds,
        "systems": [dict(system) for system in systems],
        "failures": list(failures),
        "rows": table,
        "against_baseline": against_baseline(config, records),
        "samples": {"columns": list(COLUMNS), "rows": [list(row) for row in rows(records)]},
        "heads": _heads(records),
    }


def _row(mine: Records, base: Records, nominal: float | None) -> dict[str, Any]:
    """Measures of a system in a mode.

    What methods are quoted with stands apart as ``nominal``: the share of the entries that are held,
    and of the scores that are computed while decoding.
    """
    return {
        "scores": scores(mine),
        "cost": cost(mine),
        "beside_baseline": _beside(mine, base),
        "nominal": {
            "stored": nominal if nominal is not None else _divide(_pairs(mine, base, lambda r: r.entries)),
            "read": _ratio(mine, base, lambda turn: turn.reply.decode_score_entries),
        },
    }


# ---------------------------------------------------------------------- scores


def scores(records: Records) -> dict[str, Any]:
    """Means with intervals: over all turns, and by turn, task, category, length, and length and depth."""
    questions = [(record, turn) for record in records for turn in record.questions]
    ways: dict[str, Callable[[ExampleRecord, TurnRecord], str | None]] = {
        "turn": lambda record, turn: str(turn.turn),
        "part": lambda record, turn: "first" if turn.turn == 1 else "later",
        "task": lambda record, turn: record.task,
        "category": lambda record, turn: record.category,
        "length": lambda record, turn: str(record.length),
        "length and depth": lambda record, turn: (
            None if turn.depth is None else f"{record.length}/{min(int(turn.depth * DEPTHS), DEPTHS - 1)}"
        ),
    }
    out: dict[str, Any] = {"all": _interval(questions)}
    for name, way in ways.items():
        split: dict[str, list[tuple[ExampleRecord, TurnRecord]]] = defaultdict(list)
        for record, turn in questions:
            key = way(record, turn)
            if key is not None:
                split[key].append((record, turn))
        out[name] = {key: _interval(part) for key, part in split.items()}
    return out


def _interval(questions: Iterable[tuple[ExampleRecord, TurnRecord]]) -> dict[str, Any]:
    groups: dict[str, list[float]] = defaultdict(list)
    for record, turn in questions:
        assert turn.score is not None, "a question has a score"
        groups[record.checksum].append(turn.score)
    return interval(list(groups.values())).to_dict()


def against_baseline(config: Config, records: Records) -> list[dict[str, Any]]:
    """Paired differences to the baseline on first and on later turns, with Holm's adjustment over all."""
    found = []
    by_key = {record.key: record for record in records}
    systems = dict.fromkeys(record.system for record in records if record.system != BASELINE)
    for mode in config.modes:
        for system in systems:
            for part in ("first", "later"):
                differences = []
                for record in records:
                    base = by_key.get((BASELINE, *record.key[1:]))
                    if (record.system, record.mode) != (system, mode) or base is None:
                        continue
                    pairs = [
                        (a.score, b.score)
                        for a, b in zip(base.questions, record.questions, strict=True)
                        if (a.turn == 1) == (part == "first")
                    ]
                    if pairs:
                        differences.append(statistics.fmean((b or 0.0) - (a or 0.0) for a, b in pairs))
                if differences:
                    told = paired(differences)
                    found.append({"system": system, "mode": mode, "part": part, **told.__dict__})
    for one, adjusted in zip(found, holm([one["p"] for one in found]), strict=True):
        one["p_adjusted"] = adjusted
    return found


# ---------------------------------------------------------------------- costs


def cost(records: Records) -> dict[str, Any]:
    """What the examples cost: counts are means, times are medians, so that one slow moment is no result."""
    turns = [turn for record in records for turn in record.turns]
    later = [turn.reply.time_to_first_token for turn in turns if turn.turn > 1]
    steps = sum(turn.reply.decode_steps for turn in turns)
    seconds = sum(turn.reply.decode_seconds for turn in turns if turn.reply.decode_steps)
    reads = [turn.reply for turn in turns if turn.reply.bytes_read is not None and turn.reply.decode_steps]
    peaks = [r.peak_bytes for r in records if r.peak_bytes is not None]
    grown = [
        r.peak_bytes - r.resident_bytes
        for r in records
        if r.peak_bytes is not None and r.resident_bytes is not None
    ]
    return {
        "examples": len(records),
        "first_token_seconds": statistics.median(r.first_token_seconds for r in records),
        "later_token_seconds": statistics.median(later) if later else None,
        "decode_tokens_per_second": steps / seconds if seconds > 0 else None,
        "tokens_computed": _mean(records, lambda turn: turn.reply.tokens_computed),
        "tokens_reused": _mean(records, lambda turn: turn.reply.tokens_reused),
        "score_entries": _mean(records, lambda turn: turn.reply.score_entries),
        "bytes_stored": statistics.fmean(r.turns[-1].reply.stored for r in records),
        "bytes_stored_by": _by_kind([r.turns[-1].reply.bytes_stored for r in records], len(records)),
        "bytes_read_per_token": sum(r.read or 0 for r in reads) / steps if reads and steps else None,
        "bytes_read_by": _by_kind([r.bytes_read or {} for r in reads], steps) if reads and steps else None,
        "peak_bytes": max(peaks) if peaks else None,
        "peak_growth_bytes": max(grown) if grown else None,
        "replayed_tokens": sum(r.replayed_tokens for r in records),
    }


Count = Callable[[TurnRecord], int | None]


def _mean(records: Records, count: Count) -> float | None:
    totals = [_total(record, count) for record in records]
    known = [total for total in totals if total is not None]
    return statistics.fmean(known) if len(known) == len(totals) else None


def _total(record: ExampleRecord, count: Count) -> int | None:
    found = [count(turn) for turn in record.turns]
    known = [one for one in found if one is not None]
    return sum(known) if len(known) == len(found) else None


def _by_kind(held: Sequence[Mapping[str, int]], over: int) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for one in held:
        for kind, count in one.items():
            total[kind] += count / over
    return dict(total)


def _beside(mine: Records, base: Records) -> dict[str, float | None]:
    """Ratios to the baseline over the examples that both have."""
    stored = _pairs(mine, base, lambda record: record.turns[-1].reply.stored)
    return {
        "score_entries": _ratio(mine, base, lambda turn: turn.reply.score_entries),
        "bytes_stored": _divide(stored),
        "bytes_read_per_token": _read_ratio(mine, base),
        "first_token_seconds": _median_ratio(mine, base, lambda record: record.first_token_seconds),
        "decode_seconds_per_token": _median_ratio(mine, base, _decode_seconds),
    }


def _decode_seconds(record: ExampleRecord) -> float | None:
    replies = [turn.reply for turn in record.turns if turn.reply.decode_steps]
    steps = sum(reply.decode_steps for reply in replies)
    return sum(reply.decode_seconds for reply in replies) / steps if steps else None


def _read_ratio(mine: Records, base: Records) -> float | None:
    def per_token(record: ExampleRecord) -> float | None:
        replies = [turn.reply for turn in record.turns if turn.reply.decode_steps]
        reads = [reply.read for reply in replies]
        steps = sum(reply.decode_steps for reply in replies)
        known = [read for read in reads if read is not None]
        return sum(known) / steps if steps and len(known) == len(reads) else None

    return _divide(_pairs(mine, base, per_token))


def _ratio(mine: Records, base: Records, count: Count) -> float | None:
    return _divide(_pairs(mine, base, lambda record: _total(record, count)))


def _pairs(
    mine: Records, base: Records, value: Callable[[ExampleRecord], float | None]
) -> list[tuple[float, float]]:
    """Value here and in the baseline, for the examples where both are known."""
    known = {record.key[1:]: value(record) for record in base}
    pairs = [(value(record), known.get(record.key[1:])) for record in mine]
    return [(here, there) for here, there in pairs if here is not None and there is not None]


def _divide(pairs: Sequence[tuple[float, float]]) -> float | None:
    below = sum(there for _, there in pairs)
    return sum(here for here, _ in pairs) / below if below else None


def _median_ratio(
    mine: Records, base: Records, value: Callable[[ExampleRecord], float | None]
) -> float | None:
    ratios = [here / there for here, there in _pairs(mine, base, value) if there > 0]
    return statistics.median(ratios) if ratios else None


# ---------------------------------------------------------------------- raw samples


COLUMNS = (
    *("system", "mode", "task", "category", "length", "number", "checksum", "turn", "depth", "score"),
    *("answer", "finish_reason", "tokens_computed", "tokens_reused", "tokens_generated", "score_entries"),
    *("decode_score_entries", "time_to_first_token", "decode_seconds", "bytes_stored", "bytes_read"),
    *("entries_before", "entries_after", "resident_bytes", "peak_bytes"),
)
"""What a line of the samples holds; bytes are totals over tiers, reads over the steps of the turn."""


def rows(records: Records) -> list[tuple[Any, ...]]:
    """One line per turn, in the order of :data:`COLUMNS`."""
    out = []
    for record in records:
        for turn in record.turns:
            reply = turn.reply
            out.append(
                (
                    *(record.system, record.mode, record.task, record.category, record.length, record.number),
                    *(record.checksum[:16], turn.turn, turn.depth, turn.score),
                    *(reply.text, reply.finish_reason),
                    *(reply.tokens_computed, reply.tokens_reused, reply.tokens_generated),
                    *(reply.score_entries, reply.decode_score_entries),
                    *(round(reply.time_to_first_token, 6), round(reply.decode_seconds, 6)),
                    *(reply.stored, reply.read, reply.entries_before, reply.entries_after),
                    *(record.resident_bytes, record.peak_bytes),
                )
            )
    return out


def _heads(records: Records) -> list[dict[str, Any]]:
    """Mean bytes by layer and KV head at the longest context, for every system and mode that knows them."""
    longest = max((record.length for record in records), default=0)
    groups: dict[tuple[str, str], list[list[list[int]]]] = defaultdict(list)
    for record in records:
        if record.length == longest and record.head_bytes is not None:
            groups[record.system, record.mode].append(record.head_bytes)
    return [
        {
            "system": system,
            "mode": mode,
            "length": longest,
            "bytes": [
                [statistics.fmean(column) for column in zip(*layers, strict=True)]
                for layers in zip(*grids, strict=True)
            ],
        }
        for (system, mode), grids in groups.items()
    ]
