"""``winnow bench attached``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli import show

__all__ = ["attached"]


def attached(
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Only this one; may be repeated.")
    ] = None,
    entries: Annotated[int, typer.Option(help="Entries of every head when decoding begins.")] = 8192,
    prompt: Annotated[int, typer.Option(help="How many of them are computed; the others are random.")] = 64,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of decoded tokens.")] = 4,
    preset: Annotated[str, typer.Option(help="Shape of the random model.")] = "1b-attention",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """What compressions cost and give while decoding, beside full attention, without the weights."""
    from winnow.bench import attached as bench

    with show.step_progress() as progress:
        report = bench.run(
            contenders=method,
            entries=entries,
            prompt=prompt,
            rounds=rounds,
            preset=preset,
            progress=progress,
        )
    show.report(report, lambda found: [bench.table(found)], out=out, as_json=as_json)
