"""``winnow bench lifecycle`` and ``winnow bench compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli import show

__all__ = ["compare", "interpreters", "lifecycle"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _listed(values: list[str] | None) -> list[str] | None:
    """Items of repeated, comma-separated options; ``a=1`` after a comma belongs to the item before."""
    if values is None:
        return None
    found: list[str] = []
    for part in ",".join(values).split(","):
        if found and "=" in part and ":" not in part:
            found[-1] += f",{part}"
        elif part.strip():
            found.append(part.strip())
    return found


def _numbers(values: list[str] | None) -> list[int] | None:
    """Lengths such as ``4096`` or ``4K``."""
    found = []
    for item in _listed(values) or []:
        digits, factor = (item[:-1], 1024) if item[-1:] in "kK" else (item, 1)
        if not digits.isdecimal():
            raise ValueError(f"cannot read the length {item!r}; write tokens, such as 4096 or 4K")
        found.append(int(digits) * factor)
    return found or None


def interpreters(values: list[str] | None) -> dict[str, str]:
    """``PATH`` for all peers, ``LIBRARY=PATH`` for one library's."""
    split = [value.rpartition("=") for value in values or []]
    return {library: path for library, _, path in split}


def lifecycle(
    model: Annotated[str, typer.Argument(help="'embedded', a directory, or a hub name.")] = "embedded",
    tasks: Annotated[list[str] | None, typer.Option(help="With commas between; all by default.")] = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option(help="Methods, packaged recipes or files; name:parameter=value. 'full' always runs."),
    ] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="Tokens of the contexts: 4096 or 4K.")] = None,
    modes: Annotated[
        list[str] | None, typer.Option(help="multi-turn, multi-turn-own, multi-request.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="hf:dynamic, hf:quantized, llama.cpp or kvpress:PRESS@DROPPED; may be repeated."),
    ] = None,
    peer_python: Annotated[
        list[str] | None, typer.Option(help="Interpreter of the peers: PATH, or kvpress=PATH.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Published data instead of the tasks: scbench:FILE, ruler:FILE, longbench:FILE."),
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Examples for each task and length.")] = None,
    turns: Annotated[int | None, typer.Option(help="Questions for each example.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the examples.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for journal, JSON and report.")] = Path(
        "lifecycle"
    ),
    resume: Annotated[bool, typer.Option(help="Go on with the run that --out holds.")] = False,
    as_json: Json = False,
) -> None:
    """Quality, time and bytes, turn by turn, of recipes and peers beside an uncompressed baseline."""
    from winnow.bench.lifecycle import live, run
    from winnow.bench.lifecycle.config import default

    config = default(
        model,
        tasks=_listed(tasks),
        recipes=_listed(recipes),
        lengths=_numbers(lengths),
        modes=_listed(modes),
        peers=peer,
        data=data,
        examples=examples,
        turns=turns,
        seed=seed,
    )
    try:
        with live.follow(show.notes) as watch:
            summary = run.run(config, out, resume=resume, pythons=interpreters(peer_python), watch=watch)
    except KeyboardInterrupt:
        show.notes.print(f"what is finished lies in {out}; repeat the command with --resume to go on")
        raise
    written = run.publish(summary, out)
    if as_json:
        show.emit_json(summary)
        return
    for table in live.table(summary):
        show.console.print(table)
    for note in (*live.notes(summary), "Written: " + ", ".join(map(str, written))):
        show.console.print(note, style="dim", highlight=False)


def compare(
    first: Annotated[Path, typer.Argument(help="lifecycle.json of one run.")],
    second: Annotated[Path, typer.Argument(help="lifecycle.json of another.")],
    as_json: Json = False,
) -> None:
    """What changed between two lifecycle runs, and whether it is noise."""
    from winnow.bench.lifecycle import compare as bench

    report = bench.compare(bench.load(first), bench.load(second))
    if as_json:
        show.emit_json(report)
        return
    for table in bench.tables(report):
        show.console.print(table)
    for note in report["notes"]:
        show.console.print(note, style="dim", highlight=False)
