"""How the commands print: tables, figures of bytes and times, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = [
    "bytes_text",
    "console",
    "emit_json",
    "progress_bar",
    "report",
    "stats_line",
    "step_progress",
    "token_progress",
]

console = Console()
# Progress and notes go to stderr: stdout holds the answer, or the JSON, alone.
notes = Console(stderr=True)


def emit_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, default=str))


def report(
    found: dict[str, Any],
    tables: Callable[[dict[str, Any]], Iterable[Table]],
    *,
    out: Path | None,
    as_json: bool,
    depth: int | None = None,
) -> None:
    """Save what a benchmark found, where a file is named, and print it as tables or as JSON.

    ``depth`` is that of :func:`winnow.bench.output.save`.
    """
    from winnow.bench.output import save

    if out is not None:
        save(found, out, depth=depth)
    if as_json:
        emit_json(found)
        return
    for table in tables(found):
        console.print(table)


def bytes_text(count: float) -> str:
    """``1536`` becomes ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def stats_line(stats: Any) -> str:
    """One line that says what a request cost."""
    stored = ", ".join(f"{kind} {bytes_text(n)}" for kind, n in stats.bytes_stored.items()) or "none"
    return (
        f"{stats.tokens_computed} tokens computed, {stats.tokens_reused} reused; "
        f"first token {stats.time_to_first_token:.2f} s, then {stats.decode_tokens_per_second:.1f} tokens/s; "
        f"KV stored: {stored}; KV read per token: {bytes_text(stats.bytes_read_per_token)}"
    )


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A progress display on stderr; nothing where output is no terminal or ``quiet``."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=notes,
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:
        yield bar


@contextmanager
def token_progress(quiet: bool = False) -> Iterator[Callable[[int, int, int], None]]:
    """The engine's progress callback, drawn as a bar over the prompt's tokens."""
    with progress_bar(quiet) as bar:
        task = bar.add_task("reading the prompt", total=None)

        def update(done: int, total: int, generated: int) -> None:
            if generated:
                bar.update(task, description=f"writing ({generated} tokens)", completed=done, total=total)
            else:
                bar.update(task, completed=done, total=total)

        yield update


@contextmanager
def step_progress() -> Iterator[Callable[[str, int, int], None]]:
    """The benchmarks' progress callback: what runs, steps done, steps in all."""
    with progress_bar() as bar:
        task = bar.add_task("starting", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield update
