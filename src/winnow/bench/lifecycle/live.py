"""The run in the terminal: a table that grows, progress and time left; and the table at the end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from winnow.bench.lifecycle.config import Unit
from winnow.bench.lifecycle.record import ExampleRecord
from winnow.bench.lifecycle.run import State, Watch

__all__ = ["follow", "notes", "seconds_left", "table"]

_LINE_EVERY = 30.0  # seconds between lines where the output is no terminal


@contextmanager
def follow(console: Console) -> Iterator[Watch]:
    """Give a callback for :func:`winnow.bench.lifecycle.run.run` that draws on ``console``.

    A terminal gets a live table; anything else a line now and then.
    """
    if not console.is_terminal:
        last = time.monotonic()

        def say(state: State) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY or not state.outstanding:
                last = time.monotonic()
                console.print(_progress(state), soft_wrap=True, highlight=False)

        yield say
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def draw(state: State) -> None:
            live.update(Group(_scoreboard(state), Text(_progress(state), style="dim")))

        yield draw


def seconds_left(state: State) -> float | None:
    """What the outstanding examples will take, from those that are done; None before the first is.

    An example of a system and length that has not run yet is reckoned from the nearest that has.
    """
    spent: dict[tuple[str, int], list[float]] = defaultdict(list)
    lengths: dict[int, list[float]] = defaultdict(list)
    for record in state.records.values():
        spent[record.system, record.length].append(record.seconds)
        lengths[record.length].append(record.seconds)
    if not spent:
        return None

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def guess(name: str, unit: Unit) -> float:
        if known := spent.get((name, unit.length)):
            return mean(known)
        nearest = min(lengths, key=lambda length: abs(length - unit.length))
        return mean(lengths[nearest]) * max(1.0, unit.length / nearest)

    return sum(guess(name, unit) for name, unit in state.outstanding)


def _progress(state: State) -> str:
    outstanding = len(state.outstanding)
    done = len(state.records) + len(state.failures)
    left = seconds_left(state)
    time_left = "" if left is None or not outstanding else f", about {_duration(left)} left"
    resumed = f" ({state.resumed} from before)" if state.resumed else ""
    now = f"; now {state.now}" if outstanding else ""
    return f"{done} of {done + outstanding} examples{resumed}{time_left}{now}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _scoreboard(state: State) -> Table:
    out = _table("system", "examples", "turn 1", "later", "first token", "tokens/s", "KV stored")
    by_system: dict[str, list[ExampleRecord]] = defaultdict(list)
    for record in state.records.values():
        by_system[record.system].append(record)
    for name in (*state.config.systems, *state.config.peers):
        if name in state.missing:
            out.add_row(name, "missing", style="dim")
            continue
        records = by_system.get(name, [])
        turns = [turn for record in records for turn in record.questions]
        steps = sum(turn.reply.decode_steps for turn in turns)
        seconds = sum(turn.reply.decode_seconds for turn in turns if turn.reply.decode_steps)
        firsts = sorted(record.first_token_seconds for record in records)
        stored = [record.turns[-1].reply.stored for record in records]
        out.add_row(
            name,
            str(len(records)),
            _share([turn.score or 0.0 for turn in turns if turn.turn == 1]),
            _share([turn.score or 0.0 for turn in turns if turn.turn > 1]),
            f"{firsts[len(firsts) // 2]:.2f} s" if firsts else "",
            f"{steps / seconds:.0f}" if seconds else "",
            f"{sum(stored) / len(stored) / 1e6:.1f} MB" if stored else "",
        )
    return out


def _share(scores: list[float]) -> str:
    return f"{100 * sum(scores) / len(scores):.0f} %" if scores else ""


def _table(first: str, *others: str, title: str | None = None) -> Table:
    out = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title)
    out.add_column(first, overflow="fold", min_width=12)
    for name in others:
        out.add_column(name, justify="right", no_wrap=True)
    return out


def table(summary: Mapping[str, Any]) -> Iterator[Table]:
    """One table per mode: quality with its interval, and costs, beside the baseline's."""
    for mode in summary["config"]["modes"]:
        out = _table(
            *("system", "turn 1", "later", "first\ntoken", "tokens\nper s", "scores"),
            *("KV\nstored", "KV\nread"),
            title=mode,
        )
        for row in summary["rows"]:
            if row["mode"] == mode:
                out.add_row(*_cells(row))
        for system in summary["systems"]:
            if system["missing"]:
                out.add_row(system["name"], "missing", style="dim")
        yield out


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    part, cost, beside = row["scores"]["part"], row["cost"], row["beside_baseline"]
    source, _, listed = row["system"].partition(":")
    yield f"{source}\n{listed.replace(',', ', ')}" if "=" in listed else row["system"]
    for name in ("first", "later"):
        one = part.get(name)
        yield f"{_percent(one['mean'])}\n{100 * one['low']:.0f}-{_percent(one['high'])}" if one else ""
    yield f"{cost['first_token_seconds']:.2f} s"
    yield f"{cost['decode_tokens_per_second']:.0f}" if cost["decode_tokens_per_second"] else ""
    yield _percent(beside["score_entries"])
    for nominal, measured in (("stored", "bytes_stored"), ("read", "bytes_read_per_token")):
        yield f"{_percent(beside[measured])}\n({_percent(row['nominal'][nominal])})"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def notes(summary: Mapping[str, Any]) -> list[str]:
    """How to read the table, and what is missing from it."""
    out = [
        "Right answers with 95 % bootstrap intervals over examples. Scores, KV stored and read: beside the "
        "baseline, as measured; in brackets the shares with which methods are quoted, of entries kept and of "
        "scores computed while decoding. First token: median, the context's reading included."
    ]
    out += [f"{s['name']} is missing: {s['missing']}" for s in summary["systems"] if s["missing"]]
    if failures := summary["failures"]:
        first = failures[0]
        out.append(f"Refused examples: {len(failures)}, the first by {first['key'][0]}: {first['error']}")
    return out
