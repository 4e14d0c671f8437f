"""``winnow bench files``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli import show

__all__ = ["files"]


def files(
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Times that each form is written and read.")] = 5,
    directory: Annotated[
        Path | None, typer.Option(help="Where files go; the system's temporary directory by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure what packing entries in a file saves, and what it costs."""
    from winnow.bench import files as bench

    with show.step_progress() as progress:
        report = bench.run(tokens=tokens, rounds=rounds, directory=directory, progress=progress)
    show.report(report, lambda found: [bench.table(found)], out=out, as_json=as_json, depth=4)
