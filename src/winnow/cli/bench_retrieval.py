"""``winnow bench chunks`` and ``winnow bench workers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli import show

__all__ = ["chunks", "workers"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Model = Annotated[str, typer.Option(help="embedded, or the shape of a random model: 1b or tiny.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write JSON here.")]
Seed = Annotated[int, typer.Option(help="First seed of the documents.")]


def chunks(
    model: Model = "embedded",
    contender: Annotated[
        list[str] | None, typer.Option("--contender", help="Only this one; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of each document.")] = 1024,
    pieces: Annotated[int, typer.Option(help="Chunks of a document.")] = 8,
    questions: Annotated[int, typer.Option(help="At least so many of each kind; orders, if random.")] = 60,
    turns: Annotated[int, typer.Option(help="Most questions for each document.")] = 6,
    seed: Seed = 1,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Reuse chunks in any order, with and without repair, beside full recompute and prefix reuse."""
    from winnow.bench import chunks as bench

    with show.step_progress() as progress:
        report = bench.run(
            model=model,
            contenders=contender,
            tokens=tokens,
            pieces=pieces,
            questions=questions,
            turns=turns,
            seed=seed,
            progress=progress,
        )
    show.report(report, lambda found: [bench.table(found)], out=out, as_json=as_json, depth=4)


def workers(
    model: Model = "embedded",
    entries: Annotated[int, typer.Option(help="Length of the text that all read.")] = 4096,
    steps: Annotated[int, typer.Option(help="Tokens per reader and round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    documents: Annotated[int, typer.Option(help="Documents that workers are asked about.")] = 26,
    tokens: Annotated[int, typer.Option(help="Length of each of these.")] = 1024,
    seed: Seed = 1,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Let workers share one cache, beside separate sequences over the same text."""
    from winnow.bench import workers as bench

    with show.step_progress() as progress:
        report = bench.run(
            model=model,
            entries=entries,
            steps=steps,
            rounds=rounds,
            documents=documents,
            tokens=tokens,
            seed=seed,
            progress=progress,
        )
    show.report(report, bench.tables, out=out, as_json=as_json, depth=4)
