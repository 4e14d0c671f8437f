"""The page: one HTML file that needs nothing from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from winnow.bench.lifecycle.report import figures
from winnow.bench.lifecycle.report.figures import kind_class, markup_table, table
from winnow.bench.lifecycle.report.svg import tag

__all__ = ["page"]

_MODES = {
    "multi-turn": "Multi-turn: one conversation, each turn after the golden answers of the earlier ones",
    "multi-turn-own": "Multi-turn: one conversation, each turn after the model's own earlier answers",
    "multi-request": "Multi-request: the context is read once, then every question is asked and forgotten",
}


def page(summary: Mapping[str, Any]) -> str:
    """A run's summary as an HTML page.

    Parameters
    ----------
    summary : mapping
        As `winnow.bench.lifecycle.summary.summarise` gives it.
    """
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    config, machine = summary["config"], summary["machine"]
    title = f"Lifecycle of {config['model']}"
    asked = summary["rows"][0]["scores"] if summary["rows"] else {"task": {}, "length": {}}
    sizes = ", ".join(sorted(asked["length"], key=int))
    tasks, examples = _count(len(asked["task"]), "task"), _count(config["examples"], "example")
    lead = (
        f"{tasks} at {sizes} tokens, {examples} each with {_count(config['turns'], 'question')}; "
        f"{machine['cpu']['name']}, {machine['cores']} cores, {machine['time']}."
    )
    modes = [mode for mode in config["modes"] if any(row["mode"] == mode for row in summary["rows"])]
    body = [
        tag("header", tag("p", "Winnow", class_="brand"), tag("h1", escape(title)), tag("p", escape(lead))),
        _legend(summary),
        *(_mode(summary, mode) for mode in modes),
        _differences(summary),
        _tasks(summary, modes),
        _recipes(summary),
        _machine(summary),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        + tag("title", escape(title))
        + tag("style", style)
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{tag("main", *body)}</body></html>\n'


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _section(heading: str, *parts: str) -> str:
    return tag("section", tag("h2", escape(heading)), *parts)


def _badge(number: int, name: str, kind: str) -> str:
    return tag(
        "span",
        tag("span", str(number), class_="n"),
        " " + figures.label(name),
        class_=f"tag {kind_class(kind)}",
    )


def _legend(summary: Mapping[str, Any]) -> str:
    items = []
    for number, system in enumerate(summary["systems"], 1):
        state = f"missing: {system['missing']}" if system["missing"] else system["kind"]
        items.append(tag("li", _badge(number, system["name"], system["kind"]), tag("small", escape(state))))
    failures = summary["failures"]
    refused = ""
    if failures:
        lines = [[f["key"][0], " ".join(map(str, f["key"][1:])), f["error"]] for f in failures]
        refused = tag(
            "details",
            tag("summary", f"Refused: {_count(len(failures), 'example')}"),
            table(["system", "example", "why"], lines, caption="Refused examples"),
        )
    return _section("Systems", tag("ol", *items, class_="legend"), refused)


def _mode(summary: Mapping[str, Any], mode: str) -> str:
    parts = [tag("h3", "Results"), _results(summary, mode)]
    for heading, figure in (
        ("Quality against cost", figures.frontiers(summary, mode)),
        ("Turn by turn", figures.turn_curves(summary, mode)),
        ("Length by depth", figures.length_by_depth(summary, mode)),
        ("Layers and heads", figures.head_maps(summary, mode)),
    ):
        if figure is not None:
            parts += [tag("h3", heading), figure.html]
    return _section(_MODES[mode], *parts)


def _results(summary: Mapping[str, Any], mode: str) -> str:
    numbers = {system["name"]: (i, system["kind"]) for i, system in enumerate(summary["systems"], 1)}
    rows = []
    for row in summary["rows"]:
        if row["mode"] != mode:
            continue
        cost, beside, part = row["cost"], row["beside_baseline"], row["scores"]["part"]
        number, kind = numbers[row["system"]]
        rows.append(
            [
                _badge(number, row["system"], kind),
                *(_score(part.get(name)) for name in ("first", "later")),
                f"{cost['first_token_seconds']:.2f} s",
                _known(cost["decode_tokens_per_second"], "{:.0f}"),
                _with_share(cost["score_entries"], beside["score_entries"], 1e6, "M"),
                _with_share(cost["bytes_stored"], beside["bytes_stored"], 1e6, "MB"),
                _known(row["nominal"]["stored"], "{:.0%}"),
                _with_share(cost["bytes_read_per_token"], beside["bytes_read_per_token"], 1e6, "MB"),
                _known(row["nominal"]["read"], "{:.0%}"),
                f"{_known(cost['tokens_computed'], '{:.0f}')} / {_known(cost['tokens_reused'], '{:.0f}')}",
                _known(cost["peak_bytes"], "{:.0f} MB", 1e6),
            ]
        )
    head = (
        *("system", "turn 1", "later turns", "first token", "tokens/s", "scores", "KV stored", "nominal"),
        *("KV read per token", "nominal", "tokens computed / reused", "peak memory"),
    )
    note = (
        "Right answers with 95 % bootstrap intervals over examples; per cent of the baseline below a cost. "
        "Measured: bytes of live allocations, and of the entries that the kernels read. Nominal: "
        "the shares with which methods are quoted, of entries kept and of scores computed while decoding. "
        "First token: median, the reading of the context included. An interval of no width means "
        "that all examples scored alike."
    )
    return markup_table(head, rows, caption=f"Results, {mode}", headed=True) + tag(
        "p", escape(note), class_="note"
    )


def _score(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    return f"{one['mean']:.0%}" + tag("small", f"{one['low']:.0%} to {one['high']:.0%}")


def _known(value: float | None, form: str, unit: float = 1.0) -> str:
    return "not known" if value is None else form.format(value / unit)


def _with_share(value: float | None, share: float | None, unit: float, name: str) -> str:
    if value is None:
        return "not known"
    return f"{value / unit:.2f} {name}" + (tag("small", f"{share:.0%}") if share is not None else "")


def _differences(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            figures.label(one["system"]),
            one["mode"],
            {"first": "turn 1", "later": "later turns"}[one["part"]],
            f"{100 * one['difference']:+.1f}",
            f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}",
            f"{one['p_adjusted']:.3f}",
            str(one["examples"]),
        ]
        for one in summary["against_baseline"]
    ]
    note = (
        "Points of right answers, paired by example. Sign-flip permutation test, p-values after Holm over "
        "the whole table; intervals: 95 % bootstrap over examples."
    )
    head = ("system", "mode", "part", "difference", "interval", "p", "examples")
    return _section(
        "Difference to the baseline",
        markup_table(head, rows, caption="Difference to the baseline in points", headed=True),
        tag("p", escape(note), class_="note"),
    )


def _tasks(summary: Mapping[str, Any], modes: list[str]) -> str:
    parts = []
    for mode in modes:
        rows = [row for row in summary["rows"] if row["mode"] == mode]
        for way, caption in (("category", "by category"), ("task", "by task")):
            names = list(rows[0]["scores"][way])
            cells = [
                [figures.label(row["system"]), *(_score(row["scores"][way].get(name)) for name in names)]
                for row in rows
            ]
            parts.append(markup_table(["system", *names], cells, caption=f"Right answers {caption}, {mode}"))
    return _section("Tasks", *parts)


def _recipes(summary: Mapping[str, Any]) -> str:
    parts = []
    for system in summary["systems"]:
        if system["recipe"] is None:
            told = [f"{name} {version}" for name, version in system["about"].get("versions", {}).items()]
            text = ", ".join([*told, *filter(None, [system["about"].get("note"), system["missing"]])])
            inside = tag("p", escape(text or "nothing is known"))
        else:
            inside = tag("pre", tag("code", escape(system["recipe"])), tabindex="0")
        parts.append(tag("details", tag("summary", escape(system["name"])), inside))
    return _section("Recipes and peers", *parts)


def _machine(summary: Mapping[str, Any]) -> str:
    rows = []
    for number, machine in enumerate(summary["sessions"], 1):
        what = "started" if number == 1 else "resumed"
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        rows += [
            [what, machine["time"]],
            [
                "processor",
                f"{machine['cpu']['name']}, {machine['cores']} cores, {machine['threads']} threads",
            ],
            ["memory", f"{machine['memory_bytes'] / 2**30:.1f} GiB"],
            ["instruction set", str(machine["instruction_set"])],
            ["graphics processor", str(machine["gpu"] or "none")],
            ["system", machine["system"]],
            ["versions", versions],
            ["commit", str(machine["commit"])],
        ]
    rows.append(["configuration", summary["fingerprint"]])
    return _section("Machine and versions", table(["what", "value"], rows, caption="Machine and versions"))
