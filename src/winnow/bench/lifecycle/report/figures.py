"""The report's figures, each with the table of what it draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from winnow.bench.lifecycle.config import BASELINE
from winnow.bench.lifecycle.report import svg
from winnow.bench.lifecycle.report.svg import tag
from winnow.bench.lifecycle.summary import DEPTHS

__all__ = [
    *("Figure", "frontiers", "head_maps", "kind_class", "label"),
    *("length_by_depth", "markup_table", "table", "turn_curves"),
]

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels (heading, class for the heading's badge, SVG), a sentence about them, and their table."""

    panels: Sequence[tuple[str, str, str]]
    about: str
    table: str
    small: bool = False

    @property
    def html(self) -> str:
        """The figure with its table folded up beneath it."""
        shown = "".join(
            tag("div", tag("h4", heading), drawing, class_=f"panel {kind}")
            for heading, kind, drawing in self.panels
        )
        return tag(
            "figure",
            tag("div", shown, class_="panels small" if self.small else "panels"),
            tag("figcaption", self.about),
            tag("details", tag("summary", "The same as a table"), self.table),
        )


def kind_class(kind: str) -> str:
    """Class of the style sheet for a kind of system."""
    return "k-" + kind.replace(" ", "-")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """A table whose first column names its rows; cells are text, not markup."""
    markup = [[label(row[0]), *(escape(cell) for cell in row[1:])] for row in rows]
    return markup_table(head, markup, caption=caption)


def markup_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, headed: bool = False
) -> str:
    """As :func:`table`, of cells that are markup already; ``headed`` says that a heading stands above."""
    top = tag("tr", *(tag("th", escape(cell), scope="col") for cell in head))
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    named = tag("caption", escape(caption), class_="unseen" if headed else None)
    inside = named + tag("thead", top) + tag("tbody", *body)
    return tag("div", tag("table", inside), class_="scroll", tabindex="0", role="region", aria_label=caption)


def label(name: str) -> str:
    """A system's name as markup: parameters in small type beneath it."""
    source, _, listed = name.partition(":")
    if "=" not in listed:
        return escape(name)
    return escape(source) + tag("small", escape(listed.replace(",", ", ")))


def _numbers(summary: Mapping[str, Any]) -> dict[str, int]:
    return {system["name"]: number for number, system in enumerate(summary["systems"], 1)}


def _kinds(summary: Mapping[str, Any]) -> dict[str, str]:
    return {system["name"]: kind_class(system["kind"]) for system in summary["systems"]}


def _rows(summary: Mapping[str, Any], mode: str) -> list[Row]:
    return [row for row in summary["rows"] if row["mode"] == mode]


def _heading(summary: Mapping[str, Any], name: str) -> str:
    return tag("span", str(_numbers(summary)[name]), class_="n") + " " + label(name)


# ---------------------------------------------------------------------- quality against cost

_COSTS: tuple[tuple[str, Callable[[Row], float | None], Callable[[float], str], str], ...] = (
    ("KV stored", lambda row: row["cost"]["bytes_stored"], lambda v: f"{v / 1e6:.3g}", "MB"),
    ("KV read per token", lambda row: row["cost"]["bytes_read_per_token"], lambda v: f"{v / 1e6:.3g}", "MB"),
    ("first token", lambda row: row["cost"]["first_token_seconds"], lambda v: f"{v:.3g}", "s"),
    (
        "decoding, per token",
        lambda row: 1 / speed if (speed := row["cost"]["decode_tokens_per_second"]) else None,
        lambda v: f"{v * 1e3:.3g}",
        "ms",
    ),
)


def frontiers(summary: Mapping[str, Any], mode: str) -> Figure:
    """Right answers against bytes and against time, with the line of what nothing beats."""
    numbers, kinds = _numbers(summary), _kinds(summary)
    panels: list[tuple[str, str, str]] = []
    cells: dict[str, list[str]] = {}
    unknown: set[str] = set()
    for title, cost, shown, unit in _COSTS:
        marks = []
        for row in _rows(summary, mode):
            value, score = cost(row), row["scores"]["all"]
            cells.setdefault(row["system"], [row["system"], f"{score['mean']:.1%}"])
            cells[row["system"]].append("not known" if value is None else f"{shown(value)} {unit}")
            if value is None:
                unknown.add(row["system"])
                continue
            marks.append(
                svg.Mark(
                    number=numbers[row["system"]],
                    kind=kinds[row["system"]],
                    x=value,
                    y=score["mean"],
                    low=score["low"],
                    high=score["high"],
                    title=f"{row['system']}: {score['mean']:.0%} right at {shown(value)} {unit}",
                )
            )
        name = f"{title}, {unit}"
        if marks:
            drawing = svg.scatter(marks, title=f"Right answers against {name}", x_name=name, x_text=shown)
            panels.append((f"{title}", "", drawing))
    about = (
        "Right answers of all turns (whiskers: 95 % bootstrap interval over examples) against their cost. "
        "Up and left is better; the line joins what no other system beats."
    )
    if unknown:
        about += (
            f" Not every cost is known of {', '.join(sorted(unknown))}: what a library reads is not counted."
        )
    head = ("system", "right", *(title for title, *_ in _COSTS))
    return Figure(
        panels=panels,
        about=escape(about),
        table=table(head, list(cells.values()), caption=f"Quality and cost, {mode}"),
    )


# ---------------------------------------------------------------------- turn by turn


def turn_curves(summary: Mapping[str, Any], mode: str) -> Figure:
    """Right answers by turn, one panel for each system."""
    kinds, rows = _kinds(summary), _rows(summary, mode)
    turns = [int(turn) for turn in sorted(rows[0]["scores"]["turn"], key=int)]
    base = next(row for row in rows if row["system"] == BASELINE)["scores"]["turn"]
    panels, cells = [], []
    for row in rows:
        known = row["scores"]["turn"]
        have = [turn for turn in turns if str(turn) in known]
        mine = [(known[str(t)]["mean"], known[str(t)]["low"], known[str(t)]["high"]) for t in have]
        drawing = svg.lines(
            have,
            mine,
            [base[str(t)]["mean"] for t in have],
            kind=kinds[row["system"]],
            title=f"Right answers of {row['system']} by turn",
        )
        panels.append((_heading(summary, row["system"]), kinds[row["system"]], drawing))
        cells.append([row["system"], *(f"{m:.0%} ({low:.0%} to {high:.0%})" for m, low, high in mine)])
    return Figure(
        panels=panels,
        small=True,
        about="Right answers by turn; shaded: 95 % interval; dashed: the uncompressed baseline.",
        table=table(
            ["system", *(f"turn {t}" for t in turns)], cells, caption=f"Right answers by turn, {mode}"
        ),
    )


# ---------------------------------------------------------------------- length by depth


def length_by_depth(summary: Mapping[str, Any], mode: str) -> Figure | None:
    """Right answers by length of the context and by where in it the answer lies."""
    kinds, lengths = _kinds(summary), sorted(map(int, _rows(summary, mode)[0]["scores"]["length"]))
    columns = [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}" for i in range(DEPTHS)]
    panels, cells = [], []
    for row in _rows(summary, mode):
        known = row["scores"]["length and depth"]
        if not known:
            continue
        grid = [[known.get(f"{length}/{i}", {}).get("mean") for i in range(DEPTHS)] for length in lengths]
        drawing = svg.heat(
            grid,
            lambda v: f"{100 * v:.0f}",
            rows=[_length(length) for length in lengths],
            columns=columns,
            column_name="depth of the answer in the context, %",
            title=f"Right answers of {row['system']}, per cent, by length and depth",
        )
        panels.append((_heading(summary, row["system"]), kinds[row["system"]], drawing))
        for length, line in zip(lengths, grid, strict=True):
            cells.append([row["system"], _length(length), *("" if v is None else f"{v:.0%}" for v in line)])
    if not panels:
        return None
    return Figure(
        panels=panels,
        small=True,
        about="Right answers in per cent: length of the context in tokens (down) by depth of the answer "
        "(across). Only questions whose answer lies in one place.",
        table=table(
            ["system", "length", *columns], cells, caption=f"Right answers by length and depth, {mode}"
        ),
    )


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


# ---------------------------------------------------------------------- layers and heads


def head_maps(summary: Mapping[str, Any], mode: str) -> Figure | None:
    """Bytes held by layer and KV head, at the longest context."""
    kinds = _kinds(summary)
    known = [one for one in summary["heads"] if one["mode"] == mode]
    if not known:
        return None
    top = max(value for one in known for line in one["bytes"] for value in line)
    unit, factor = ("MB", 1e6) if top >= 1e6 else ("KB", 1e3)
    panels, cells = [], []
    for one in known:
        heads = len(one["bytes"][0])
        drawing = svg.heat(
            one["bytes"],
            lambda v: f"{v / factor:.3g}",
            rows=[f"layer {i}" for i in range(len(one["bytes"]))],
            columns=[str(i) for i in range(heads)],
            column_name=f"KV head; {unit}",
            title=f"Bytes of the entries of {one['system']} by layer and KV head",
            top=top,
        )
        panels.append((_heading(summary, one["system"]), kinds[one["system"]], drawing))
        for layer, line in enumerate(one["bytes"]):
            cells.append(
                [one["system"], str(layer), f"{sum(line) / factor:.4g}", *(f"{v / factor:.4g}" for v in line)]
            )
    heads = max(len(one["bytes"][0]) for one in known)
    return Figure(
        panels=panels,
        small=True,
        about=f"{unit} of entries by layer and KV head after the last turn, mean over the examples of "
        f"{_length(known[0]['length'])} tokens; all panels share one scale.",
        table=table(
            ["system", "layer", "all heads", *(f"head {i}" for i in range(heads))],
            cells,
            caption=f"Entries by layer and KV head in {unit}, {mode}",
        ),
    )
