"""``winnow bench serve`` and ``winnow bench soak``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from winnow.cli import show
from winnow.cli.bench_lifecycle import interpreters

__all__ = ["serve", "soak"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def serve(
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="winnow, transformers, 'transformers batching', llama.cpp, vllm; may be repeated; all that "
            "are installed by default."
        ),
    ] = None,
    workload: Annotated[str, typer.Option(help="multi-turn, shared-prefix or mixed.")] = "multi-turn",
    preset: Annotated[str, typer.Option(help="Shape of the random model: 1b or tiny.")] = "1b",
    clients: Annotated[int, typer.Option(help="Conversations.")] = 16,
    turns: Annotated[int, typer.Option(help="Questions of each conversation.")] = 3,
    prefix: Annotated[int, typer.Option(help="Tokens of the prefix that they share.")] = 4096,
    question: Annotated[int, typer.Option(help="Tokens of a question.")] = 64,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.")] = 32,
    rate: Annotated[float, typer.Option(help="Arrivals per second, at random; 0 is all at once.")] = 2.0,
    first_deadline: Annotated[
        float, typer.Option(help="Seconds until the first token of a good answer.")
    ] = 10.0,
    token_deadline: Annotated[float, typer.Option(help="Seconds per token of a good answer.")] = 1.0,
    option: Annotated[
        list[str] | None, typer.Option(help="A word to pass on to 'winnow serve'; may be repeated.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Write the random model here, or take the one that is there.")
    ] = None,
    peer_python: Annotated[
        list[str] | None, typer.Option(help="Interpreter of a peer's own environment: vllm=PATH.")
    ] = None,
    again: Annotated[
        Path | None, typer.Option(help="Load nothing: tables and figure from the JSON of an earlier run.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write JSON here, and the figure beside it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Load an OpenAI-compatible server, and its peers, with conversations that arrive at random."""
    from winnow.bench import serve as bench
    from winnow.bench import serve_report
    from winnow.bench.output import save

    if again is not None:
        report = serve_report.with_curves(json.loads(again.read_text()))
    else:
        with show.step_progress() as progress:
            report = bench.run(
                servers=server or bench.SERVERS,
                workload=workload,
                preset=preset,
                clients=clients,
                turns=turns,
                prefix=prefix,
                question=question,
                answer=answer,
                rate=rate,
                first_deadline=first_deadline,
                token_deadline=token_deadline,
                options=option or (),
                model=model,
                pythons=interpreters(peer_python),
                progress=progress,
            )
    if out is not None:
        save(report, out)
        serve_report.draw(report, out.with_suffix(".png"))
    if as_json:
        show.emit_json(report)
        return
    show.console.print(serve_report.table(report))
    show.console.print(serve_report.curve_table(report))
    for name, why in report["missing"].items():
        show.notes.print(f"without {name}: {why}", style="dim", highlight=False)


def soak(
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 2000,
    clients: Annotated[int, typer.Option(help="Threads that send them.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Send many mixed requests with random cancels to a server; exit code 2 where anything leaks."""
    from winnow.bench import soak as bench
    from winnow.bench.output import save

    with show.step_progress() as progress:
        report = bench.run(requests=requests, clients=clients, seed=seed, progress=progress)
    if out is not None:
        save(report, out)
    if as_json:
        show.emit_json(report)
    if wrong := bench.check(report):
        raise ValueError("the soak failed: " + "; ".join(wrong))
    if not as_json:
        last = report["resident"][-1]
        show.console.print(
            f"{requests} requests, ends {report['ends']}, {report['preemptions']} preemptions; resident "
            f"{show.bytes_text(last)} at the end; all KV memory accounted for"
        )
