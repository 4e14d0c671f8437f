"""What ``winnow bench serve`` shows: tables and a figure, all of it computed from the samples.

Goodput depends on the deadline: of a server that is slow enough it is nothing, and there is no ratio to
nothing. So it is given for several deadlines, up to none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from winnow.bench.serve_load import Exchange, goodput

__all__ = ["DEADLINES", "curve_table", "draw", "markdown", "table", "with_curves"]

DEADLINES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Seconds until the first token, beside that of the run itself and none."""


def with_curves(report: dict[str, Any]) -> dict[str, Any]:
    """Add to every server its goodput at several deadlines, and Winnow's as a multiple of it.

    Parameters
    ----------
    report : dict
        Of :func:`winnow.bench.serve.run`, of whatever age: the samples are all it takes.

    Returns
    -------
    dict
        The report with, per server, a list ``goodput`` of ``first_deadline`` (seconds; None for none at all,
        neither for the first token nor for the others), ``per_second`` and, for peers, ``winnow_times`` (None
        where one of the two is 0).
    """
    config, servers = report["config"], report["servers"]
    deadlines = [*sorted({*DEADLINES, config["first_deadline"]}), None]
    rates = {name: _rates(found, deadlines, config["token_deadline"]) for name, found in servers.items()}
    own = rates.get("winnow")
    curves: dict[str, Any] = {}
    for name, found in servers.items():
        points: list[dict[str, Any]] = [
            {"first_deadline": deadline, "per_second": rate}
            for deadline, rate in zip(deadlines, rates[name], strict=True)
        ]
        if own is not None and name != "winnow":
            for point, ours in zip(points, own, strict=True):
                theirs = point["per_second"]
                point["winnow_times"] = ours / theirs if ours and theirs else None
        curves[name] = {**found, "goodput": points}
    return {**report, "servers": curves}


def _rates(found: dict[str, Any], deadlines: Sequence[float | None], token_deadline: float) -> list[float]:
    exchanges = [Exchange(**sample) for sample in found["samples"]]
    limits = [(math.inf, math.inf) if one is None else (one, token_deadline) for one in deadlines]
    return [goodput(exchanges, found["seconds"], first, token) for first, token in limits]


def _cell(spread: dict[str, float] | None) -> str:
    return "none" if spread is None else f"{spread['median']:.3g} / {spread['p95']:.3g}"


def table(report: dict[str, Any]) -> Table:
    """One row per server."""
    config = report["config"]
    drawn = Table(
        title=(
            f"{config['workload']}, {config['clients']} clients, {config['turns']} turns, prefix of "
            f"{config['prefix']} tokens, {config['preset']}"
        ),
        caption=(
            f"good: first token within {config['first_deadline']:g} s and {config['token_deadline']:g} s "
            "per token; times: median / 95th percentile; hit: how much sooner the first token of a known "
            "prefix comes on an idle server"
        ),
    )
    for name in ("server", "good/s", "first token, s", "per token, s", "reused", "hit", "GiB", "failed"):
        drawn.add_column(name, justify="left" if name == "server" else "right")
    for name, found in report["servers"].items():
        ratio = found["probe"].get("ratio")
        drawn.add_row(
            name,
            f"{found['goodput_per_second']:.3g}",
            _cell(found["first_token"]),
            _cell(found["per_token"]),
            "" if found["hit_rate"] is None else f"{found['hit_rate']:.0%}",
            "" if ratio is None else f"{ratio:.1f} x",
            f"{found['peak_bytes'] / 2**30:.1f}",
            str(found["failed"]),
        )
    return drawn


def _deadline(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds:g} s"


def curve_table(report: dict[str, Any]) -> Table:
    """Goodput by deadline, one column per server."""
    servers = with_curves(report)["servers"]
    drawn = Table(
        title="good answers per second, by deadline of the first token",
        caption=(
            f"with {report['config']['token_deadline']:g} s per token, but under 'none', where every whole "
            "answer counts; in brackets: Winnow's as a multiple, where both are above 0"
        ),
    )
    drawn.add_column("deadline", justify="right")
    for name in servers:
        drawn.add_column(name, justify="right")
    for points in zip(*(found["goodput"] for found in servers.values()), strict=True):
        drawn.add_row(_deadline(points[0]["first_deadline"]), *map(_rate, points))
    return drawn


def _rate(point: dict[str, Any]) -> str:
    times = point.get("winnow_times")
    return f"{point['per_second']:.3g}" + ("" if times is None else f" ({times:.1f} x)")


def markdown(report: dict[str, Any], source: str) -> str:
    """A load test as a Markdown table: what clients saw, and answers per second by deadline."""
    config, machine = report["config"], report["machine"]
    servers = with_curves(report)["servers"]
    heads = ["first token, s", "per token, s", "reused", "first token of a known prefix", "GiB"]
    deadlines = [point["first_deadline"] for point in next(iter(servers.values()))["goodput"]]
    shown = [i for i, one in enumerate(deadlines) if one is None or one >= config["first_deadline"]]
    heads += [
        "answers/s" if deadlines[i] is None else f"first token within {_deadline(deadlines[i])}"
        for i in shown
    ]
    lines = [f"| server | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, found in servers.items():
        ratio = found["probe"].get("ratio")
        cells = (
            f"`{found['command'].split(' --')[0]}`" + (", continuous batching" if "batching" in name else ""),
            _cell(found["first_token"]),
            _cell(found["per_token"]),
            "not told" if found["hit_rate"] is None else f"{found['hit_rate']:.0%}",
            "" if ratio is None else f"{ratio:.1f} x sooner",
            f"{found['peak_bytes'] / 2**30:.1f}",
            *(_rate(found["goodput"][i]) for i in shown),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{config['clients']} clients with {config['turns']} turns each over a prefix of {config['prefix']} "
        f"tokens, questions of {config['question']} tokens, answers of {config['answer']}, random weights of "
        f"the shape {config['preset']}; {machine['cpu']['name']}, {machine['cores']} cores. Times: median / "
        "95th percentile. The last columns are good answers per second, those with a deadline also within "
        f"{config['token_deadline']:g} s per token; in brackets, how many times as many Winnow gives. "
        f"Raw samples in `{source}`.",
    ]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """First-token times of every request over time, and goodput over the deadline beside it.

    Raises
    ------
    ValueError
        Without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing; install winnow-llm[plot] for the figure")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    servers = with_curves(report)["servers"]
    for number, (name, found) in enumerate(servers.items()):
        samples = [one for one in found["samples"] if not one["error"]]
        times.scatter(
            [one["begin"] for one in samples],
            [one["first"] for one in samples],
            s=14,
            c=f"C{number}",
            label=name,
        )
        rates = [point["per_second"] for point in found["goodput"]]
        curves.plot(range(len(rates)), rates, "o-", c=f"C{number}", ms=4)
        ticks = [_deadline(point["first_deadline"]) for point in found["goodput"]]
        curves.set_xticks(range(len(ticks)), ticks, rotation=45)
    times.axhline(report["config"]["first_deadline"], color="0.5", lw=1, ls="--")
    times.set(xlabel="request sent, s after the start", ylabel="first token after, s", yscale="log")
    times.legend(frameon=False)
    curves.set(xlabel="deadline of the first token", ylabel="good answers per second")
    curves.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None} if os.fspath(path).endswith("png") else None)
