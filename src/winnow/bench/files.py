"""``winnow bench files``: what packing the entries of a sequence saves in a file, and what it costs.

A prompt is read, and its entries are written and read back in several forms, in turns. Beside them stands a
plain file of as many bytes, written and forced to the same disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from winnow.bench.machine import describe
from winnow.engine.engine import Engine
from winnow.engine.request import SamplingParams
from winnow.engine.sequence import Sequence
from winnow.models.embedded import documents
from winnow.models.load import load_model
from winnow.models.random import random_model
from winnow.recipe import Recipe
from winnow.store import files
from winnow.store.sequence import SequenceStore
from winnow.types import Demotion, LanguageModel, Plan

__all__ = ["FORMS", "markdown", "run", "table"]

# Codec of the entries, and whether the file is packed.
FORMS: dict[str, tuple[str, bool]] = {
    "as they are": ("raw", False),
    "packed": ("raw", True),
    "int8, packed": ("int8", True),
    "int4, packed": ("int4", True),
}
_PAGE = 64


def _prompt(model: LanguageModel, text: Any, tokens: int) -> list[int]:
    if text is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, model.vocab_size, (tokens,), generator=generator).tolist()
    document = documents.make("key-value", tokens=tokens, seed=0)
    encoded: list[int] = text.encode(document.text)
    return encoded[:tokens]


def _read(model: LanguageModel, tokens: list[int]) -> Sequence:
    engine = Engine(model, Recipe())
    sequence = engine.new_sequence()
    engine.submit(tokens, SamplingParams(max_new_tokens=1, ignore_eos=True), sequence=sequence)
    while engine.busy:
        engine.step()
    return sequence


def _plain(path: Path, size: int) -> float:
    """Seconds to write so many bytes and force them to the disk."""
    data = os.urandom(size)
    begin = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def _timed(act: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = act(*arguments, **options)
    return time.perf_counter() - begin, made


def _measure(store: SequenceStore, directory: Path, rounds: int) -> dict[str, Any]:
    """Seconds and sizes of every form; the store ends in the last one's codec."""
    entries = sum(s.nbytes for layer in range(store.layers) for s in store.segments(layer))
    found: dict[str, Any] = {"entries_bytes": entries, "forms": {}}
    path = directory / "sequence.kv"
    for name, (codec, packed) in FORMS.items():
        if codec != "raw":
            whole = store.length // _PAGE * _PAGE
            for layer in range(store.layers):
                store.apply(layer, Plan(demote=(Demotion(oldest=whole, codec=codec),)))
        writes, reads, limits = [], [], []
        for _ in range(rounds):
            seconds, _ = _timed(files.save, store, path, {}, packed=packed)
            writes.append(seconds)
            seconds, (again, _) = _timed(files.load, path)
            reads.append(seconds)
            again.close()
            limits.append(_plain(directory / "plain", path.stat().st_size))
        found["forms"][name] = {
            "file_bytes": path.stat().st_size,
            "write_seconds": writes,
            "read_seconds": reads,
            "plain_write_seconds": limits,
        }
    return found


def run(
    *,
    tokens: int = 4096,
    rounds: int = 5,
    directory: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the embedded model on a text of its language, and a random one with a 1B model's heads.

    Parameters
    ----------
    tokens : int
        Of the prompt.
    rounds : int
    directory : Path or None
        Where files go; the system's temporary directory by default.

    Returns
    -------
    dict
        ``models``: for each, bytes of the entries and, per form, bytes of the file and every round's seconds.
    """
    found = {}
    for done, name in enumerate(("embedded", "1b-attention")):
        if progress is not None:
            progress("files", done, 2)
        if name == "embedded":
            model, text = load_model("embedded")
        else:
            model, text = load_model(random_model(name))
        sequence = _read(model, _prompt(model, text, tokens))
        with tempfile.TemporaryDirectory(prefix="winnow-files-", dir=directory) as temporary:
            found[name] = _measure(sequence.store, Path(temporary), rounds)
        sequence.close()
    return {
        "command": "winnow bench files",
        "config": {"tokens": tokens, "rounds": rounds},
        "machine": describe(),
        "models": found,
    }


def table(report: dict[str, Any]) -> Table:
    """Sizes beside the entries in memory, and speeds in megabytes of raw entries per second."""
    shown = Table(title=f"Files of {report['config']['tokens']} tokens")
    for heading in ("model", "form", "file", "of raw", "write MB/s", "read MB/s", "plain write MB/s"):
        shown.add_column(heading, justify="left" if heading in ("model", "form") else "right")
    for model, one in report["models"].items():
        raw = one["entries_bytes"]
        for form, figures in one["forms"].items():
            size = figures["file_bytes"]
            shown.add_row(
                model,
                form,
                f"{size / 1e6:.1f} MB",
                f"{100 * size / raw:.0f} %",
                f"{raw / median(figures['write_seconds']) / 1e6:.0f}",
                f"{raw / median(figures['read_seconds']) / 1e6:.0f}",
                f"{size / median(figures['plain_write_seconds']) / 1e6:.0f}",
            )
    return shown


def markdown(report: dict[str, Any], source: str) -> str:
    """The same for a page."""
    lines = [
        "| model | form | file, of raw entries | write MB/s | read MB/s | plain file, write MB/s |",
        "|---|---|---|---|---|---|",
    ]
    for model, one in report["models"].items():
        raw = one["entries_bytes"]
        for form, figures in one["forms"].items():
            size = figures["file_bytes"]
            speeds = (
                raw / median(figures["write_seconds"]),
                raw / median(figures["read_seconds"]),
                size / median(figures["plain_write_seconds"]),
            )
            cells = (model, form, f"{size / raw:.0%}", *(f"{speed / 1e6:.0f}" for speed in speeds))
            lines.append("| " + " | ".join(cells) + " |")
    machine, config = report["machine"], report["config"]
    command = f"{report['command']} --tokens {config['tokens']} --rounds {config['rounds']} --out {source}"
    lines += ["", f"{machine['cpu']['name']}, {machine['cores']} cores; `{command}`"]
    return "\n".join(lines)
