"""``winnow bench ...`` and ``winnow demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli import bench_attached, bench_lifecycle, bench_retrieval, show

__all__ = ["bench_app", "demo"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write JSON (and a figure) here.")]

bench_app = typer.Typer(help="Measure, beside the machine's limits and fair baselines.", no_args_is_help=True)
bench_app.command("lifecycle")(bench_lifecycle.lifecycle)
bench_app.command("compare")(bench_lifecycle.compare)
bench_app.command("attached")(bench_attached.attached)
bench_app.command("chunks")(bench_retrieval.chunks)
bench_app.command("workers")(bench_retrieval.workers)


def demo(
    tokens: Annotated[int, typer.Option(help="Length of each document.")] = 4096,
    documents: Annotated[int, typer.Option(help="Documents per task.")] = 2,
    turns: Annotated[int, typer.Option(help="Questions per document.")] = 6,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", help="Recipes beside full attention; may be repeated."),
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Answer questions over long documents with full attention and with recipes; print one table."""
    from winnow.bench import demo as bench
    from winnow.bench.output import save

    with show.step_progress() as progress:
        report = bench.run(
            tokens=tokens, documents=documents, turns=turns, recipes=recipe or None, progress=progress
        )
    if out is not None:
        save(report, out)
    if as_json:
        show.emit_json(report)
    else:
        show.console.print(bench.table(report))
        show.console.print(bench.reading(), style="dim")


@bench_app.command("kernels")
def kernels(
    quick: Annotated[bool, typer.Option(help="Small shapes: under half a minute.")] = False,
    op: Annotated[list[str] | None, typer.Option("--op", help="Only this kernel; may be repeated.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time each kernel beside the machine's limit and PyTorch's best form, in one run."""
    from winnow.bench import kernels as bench

    with show.step_progress() as progress:
        report = bench.run(quick=quick, ops=op, out=out, progress=progress)
    if as_json:
        show.emit_json(report)
    else:
        show.console.print(bench.table(report))


@bench_app.command("end-to-end")
def end_to_end(
    contender: Annotated[
        list[str] | None, typer.Option("--contender", help="Only this one; may be repeated.")
    ] = None,
    decode_at: Annotated[int, typer.Option(help="Entries in the cache while decoding.")] = 32768,
    prefill: Annotated[int, typer.Option(help="Prompt tokens of the prefill; 0 skips it.")] = 16384,
    prefill_rounds: Annotated[int, typer.Option(help="Times that every prefill is repeated, in turns.")] = 1,
    preset: Annotated[str, typer.Option(help="Shape of the random model: 1b or tiny.")] = "1b",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Whole models beside Hugging Face's caches and llama.cpp: decode, prefill, memory, in one run."""
    from winnow.bench import end_to_end as bench

    with show.step_progress() as progress:
        report = bench.run(
            contenders=contender,
            decode_at=decode_at,
            prefill=prefill,
            prefill_rounds=prefill_rounds,
            preset=preset,
            progress=progress,
        )
    show.report(report, bench.tables, out=out, as_json=as_json)
