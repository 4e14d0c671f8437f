"""Small drawings as SVG text: colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Mark", "Scale", "heat", "lines", "scatter", "tag"]

_WIDTH, _HEIGHT = 330, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 24, 34


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element; ``_`` in attribute names stands for ``-``, one at their end is dropped."""
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{listed}>{''.join(children)}</{name}>"


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to places on an axis, with round ticks.

    Attributes
    ----------
    low, high : float
        Values at the ends.
    start, stop : float
        Places of the ends.
    """

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, about: int = 4) -> list[float]:
        """Round values between the ends, about so many."""
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a scatter plot: its number and class, its place, an interval of y, and a title."""

    number: int
    kind: str
    x: float
    y: float
    low: float
    high: float
    title: str


def _frame(
    x: Scale, y: Scale, x_name: str, x_text: Callable[[float], str], x_ticks: Sequence[float] | None = None
) -> Iterable[str]:
    """Axes: a line per tick of y in per cent, ticks and name of x."""
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = y(value)
        yield tag("line", x1=x.start, x2=x.stop, y1=at, y2=at, class_="grid")
        yield tag("text", f"{value:.0%}", x=x.start - 6, y=at + 4, class_="tick", text_anchor="end")
    for value in x.ticks() if x_ticks is None else x_ticks:
        at = x(value)
        yield tag("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="axis")
        yield tag("text", x_text(value), x=at, y=y.start + 16, class_="tick", text_anchor="middle")
    yield tag("line", x1=x.start, x2=x.stop, y1=y.start, y2=y.start, class_="axis")
    yield tag("text", escape(x_name), x=x.stop, y=y.start + 31, class_="name", text_anchor="end")


def _svg(title: str, width: float, height: float, *parts: str) -> str:
    return tag(
        "svg",
        tag("title", escape(title)),
        *parts,
        viewBox=f"0 0 {_text(width)} {_text(height)}",
        role="img",
        aria_label=title,
    )


def scatter(marks: Sequence[Mark], *, title: str, x_name: str, x_text: Callable[[float], str]) -> str:
    """Quality (up is better) over a cost (left is better) with the line of what nothing beats."""
    x = Scale(low=0.0, high=max(m.x for m in marks) * 1.06 or 1.0, start=_LEFT, stop=_WIDTH - _RIGHT)
    y = Scale(low=0.0, high=1.0, start=_HEIGHT - _BOTTOM, stop=_TOP)
    parts = [*_frame(x, y, x_name, x_text)]
    best = pareto(marks)
    path = f"M{_text(x(best[0].x))} {_text(y(best[0].y))}" + "".join(
        f"H{_text(x(m.x))}V{_text(y(m.y))}" for m in best[1:]
    )
    parts.append(tag("path", d=f"{path}H{_text(x.stop)}", class_="pareto"))
    dots = [(x(m.x), y(m.y)) for m in marks]
    taken = list(dots)
    for mark, (px, py) in zip(marks, dots, strict=True):
        lx, ly = _free(px, py, taken)
        taken.append((lx, ly))
        far = math.hypot(lx - px, ly - py) > 14
        whisker = tag("line", x1=px, x2=px, y1=y(mark.low), y2=y(mark.high), class_="whisker")
        leader = tag("line", x1=px, y1=py, x2=lx, y2=ly, class_="leader") if far else ""
        parts.append(
            tag(
                "g",
                tag("title", escape(mark.title)),
                whisker,
                leader,
                tag("circle", cx=px, cy=py, r=4, class_="dot"),
                tag("circle", cx=lx, cy=ly, r=7.5, class_="badge"),
                tag("text", str(mark.number), x=lx, y=ly + 3.6, class_="number", text_anchor="middle"),
                class_=mark.kind,
            )
        )
    return _svg(title, _WIDTH, _HEIGHT, *parts)


def pareto(marks: Sequence[Mark]) -> list[Mark]:
    """Those that no other beats at no more cost, cheapest first."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x, -m.y)):
        if not best or mark.y > best[-1].y:
            best.append(mark)
    return best


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """A place near a point for its number, clear of everything placed so far."""
    for radius in (12.0, 19.0, 27.0, 36.0, 46.0, 57.0, 70.0):
        for turn in range(12):
            angle = math.pi / 2 + (turn + 1) // 2 * (-1) ** turn * math.pi / 6
            px, py = x + radius * math.cos(angle), y + radius * math.sin(angle)
            inside = _LEFT + 8 <= px <= _WIDTH - 9 and 9 <= py <= _HEIGHT - _BOTTOM - 9
            if inside and all(
                math.hypot(px - tx, py - ty) >= 11.5 + (i >= 0) * 4 for i, (tx, ty) in enumerate(taken)
            ):
                return px, py
    return x, y


def lines(
    turns: Sequence[int],
    mine: Sequence[tuple[float, float, float]],
    base: Sequence[float],
    *,
    kind: str,
    title: str,
) -> str:
    """Scores by turn with their intervals, over the baseline's as a thin line."""
    width, height = 220, 150
    x = Scale(low=turns[0] - 0.2, high=turns[-1] + 0.2, start=_LEFT, stop=width - 10)
    y = Scale(low=0.0, high=1.0, start=height - _BOTTOM, stop=10)
    band = "M" + "L".join(
        f"{_text(x(t))} {_text(y(high))}" for t, (_, _, high) in zip(turns, mine, strict=True)
    )
    band += "L" + "L".join(
        f"{_text(x(t))} {_text(y(low))}" for t, (_, low, _) in reversed(list(zip(turns, mine, strict=True)))
    )
    line = "M" + "L".join(f"{_text(x(t))} {_text(y(m))}" for t, (m, _, _) in zip(turns, mine, strict=True))
    below = "M" + "L".join(f"{_text(x(t))} {_text(y(b))}" for t, b in zip(turns, base, strict=True))
    dots = [
        tag("circle", cx=x(t), cy=y(m), r=3, class_="dot") for t, (m, _, _) in zip(turns, mine, strict=True)
    ]
    return _svg(
        title,
        width,
        height,
        *_frame(x, y, "turn", lambda v: f"{v:.0f}", [float(t) for t in turns]),
        tag("path", d=below, class_="baseline-line"),
        tag(
            "g",
            tag("path", d=f"{band}Z", class_="band"),
            tag("path", d=line, class_="line"),
            *dots,
            class_=kind,
        ),
    )


def heat(
    cells: Sequence[Sequence[float | None]],
    shown: Callable[[float], str],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    column_name: str,
    top: float = 1.0,
) -> str:
    """A grid of shaded cells with their values; ``top`` is shaded most, None is left empty."""
    left, wide, high = 46, 39, 24
    width, height = left + wide * len(columns) + 2, high * len(rows) + 34
    parts = []
    for i, (row, name) in enumerate(zip(cells, rows, strict=True)):
        parts.append(tag("text", escape(name), x=left - 6, y=i * high + 16, class_="tick", text_anchor="end"))
        for j, value in enumerate(row):
            if value is None:
                continue
            opacity = round(min(max(value / top, 0.0), 1.0), 3) if top else 0.0
            box = {"x": left + j * wide + 1, "y": i * high + 1, "width": wide - 2, "height": high - 2}
            parts.append(tag("rect", **box, class_="cell-back"))
            parts.append(tag("rect", **box, class_="cell", fill_opacity=opacity))
            parts.append(
                tag(
                    *("text", shown(value)),
                    x=left + (j + 0.5) * wide,
                    y=i * high + 16,
                    class_="value",
                    text_anchor="middle",
                )
            )
    for j, name in enumerate(columns):
        at = left + (j + 0.5) * wide
        parts.append(
            tag("text", escape(name), x=at, y=high * len(rows) + 14, class_="tick", text_anchor="middle")
        )
    parts.append(
        tag(
            "text",
            escape(column_name),
            x=width - 2,
            y=high * len(rows) + 29,
            class_="name",
            text_anchor="end",
        )
    )
    return _svg(title, width, height, *parts)
