"""The report is one page that needs nothing from anywhere, opens cleanly and can be read without colour."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from winnow.bench.lifecycle.config import default
from winnow.bench.lifecycle.record import ExampleRecord, Reply, TurnRecord
from winnow.bench.lifecycle.report import page, svg
from winnow.bench.lifecycle.report.figures import kind_class
from winnow.bench.lifecycle.summary import summarise
from winnow.bench.machine import describe

SYSTEMS = [
    {"name": "full", "kind": "baseline", "recipe": "{}\n", "missing": None, "about": {}},
    {
        "name": "snapkv:keep=96,window=8",
        "kind": "compression",
        "recipe": "a: <b>\n",
        "missing": None,
        "about": {},
    },
    {"name": "hf:dynamic", "kind": "peer", "recipe": None, "missing": None, "about": {"nominal": 1.0}},
    {"name": "kvpress:X@0.5", "kind": "peer", "recipe": None, "missing": "no <kvpress> here", "about": {}},
]


def record(system, mode, task, length, number, right):
    """A record whose figures follow from its arguments."""
    counted = system != "hf:dynamic"

    def reply(turn):
        return Reply(
            text="<script>alert(1)</script>",
            finish_reason="stop",
            tokens_computed=length if turn <= 1 else 10,
            tokens_reused=0 if turn <= 1 else length,
            tokens_generated=4,
            score_entries=length * length if counted else None,
            decode_score_entries=length if counted else None,
            time_to_first_token=0.001 * length,
            decode_seconds=0.03,
            bytes_stored={"host/raw": 6144 * length, "host/index": 10},
            bytes_read={"host/raw": 6144 * length} if counted else None,
        )

    turns = [TurnRecord(turn=i, depth=0.2 * i, score=float(right(i)), reply=reply(i)) for i in (1, 2, 3)]
    if mode == "multi-request":
        turns.insert(0, TurnRecord(turn=0, depth=None, score=None, reply=reply(0)))
    return ExampleRecord(
        system=system,
        mode=mode,
        task=task,
        category="string",
        length=length,
        number=number,
        checksum=f"{task}{length}{number}",
        turns=tuple(turns),
        head_bytes=[[1000.0, 2000.0], [3000.0, 4000.0]] if counted else None,
        entries=(96 if "snapkv" in system else length) if counted else None,
        resident_bytes=10**8,
        peak_bytes=2 * 10**8,
    )


@pytest.fixture(scope="module")
def summary():
    config = default(
        tasks=["kv", "vt"],
        lengths=[512, 1000],
        examples=2,
        turns=3,
        recipes=[SYSTEMS[1]["name"]],
        peers=["hf:dynamic", "kvpress:X@0.5"],
    )
    records = [
        record(
            system, mode, task, length, number, lambda turn, s=system: s != SYSTEMS[1]["name"] or turn == 1
        )
        for system in ("full", SYSTEMS[1]["name"], "hf:dynamic")
        for mode in config.modes
        for task in config.tasks
        for length in config.lengths
        for number in range(2)
    ]
    failures = [{"key": ["hf:dynamic", "multi-turn", "kv", 512, 9], "error": "<no>"}]
    return json.loads(json.dumps(summarise(config, SYSTEMS, [describe()], 60.0, records, failures)))


class Reader(HTMLParser):
    """Checks that elements nest, and collects them."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.text += text


@pytest.fixture(scope="module")
def read(summary):
    reader = Reader()
    reader.feed(page(summary))
    assert reader.open == []
    return reader


def test_nothing_is_fetched_and_nothing_runs(summary, read):
    names = {name for name, _ in read.elements}
    assert not names & {"script", "img", "iframe", "object", "base"}
    for _, attributes in read.elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "src", "xlink:href"):
                assert value == "data:,"
    assert not re.search(r"url\(|@import|https?://", page(summary))


def test_what_was_measured_can_be_read_without_seeing_a_figure(read):
    drawings = [attributes for name, attributes in read.elements if name == "svg"]
    assert len(drawings) > 12
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)
    figures = [name for name, _ in read.elements if name == "figure"]
    tables = [name for name, _ in read.elements if name == "table"]
    captions = [name for name, _ in read.elements if name == "caption"]
    assert len(figures) == 8, "four kinds in each of two modes"
    assert len(tables) == len(captions) >= len(figures) + 4
    assert dict(read.elements[0:1] and [read.elements[0]])["html"]["lang"] == "en"
    for words in ("no <kvpress> here", "a: <b>", "<no>", "Refused: 1 example", "Machine and versions"):
        assert words in read.text


def test_numbers_of_the_page_are_those_of_the_summary(summary, read):
    row = next(r for r in summary["rows"] if r["system"].startswith("snapkv") and r["mode"] == "multi-turn")
    assert row["scores"]["part"]["first"]["mean"] == 1.0
    assert row["scores"]["part"]["later"]["mean"] == 0.0
    assert row["nominal"]["stored"] == pytest.approx(96 * 4 / (2 * (512 + 1000)))
    assert row["cost"]["first_token_seconds"] == pytest.approx(0.756)
    assert "0.76 s" in read.text
    requests = next(r for r in summary["rows"] if r["system"] == "full" and r["mode"] == "multi-request")
    assert requests["cost"]["first_token_seconds"] == pytest.approx(2 * 0.756), "the context is read first"
    peer = next(r for r in summary["rows"] if r["system"] == "hf:dynamic")
    assert peer["beside_baseline"]["bytes_stored"] == 1.0
    assert peer["beside_baseline"]["bytes_read_per_token"] is None
    assert peer["cost"]["score_entries"] is None
    later = [
        a for a in summary["against_baseline"] if a["part"] == "later" and a["system"].startswith("snapkv")
    ]
    assert [a["difference"] for a in later] == [-1.0, -1.0]
    assert all(a["p_adjusted"] > a["p"] for a in later)


def test_every_kind_of_system_has_a_colour_in_both_themes():
    style = page.__globals__["__file__"].replace("page.py", "style.css")
    with open(style, encoding="utf-8") as file:
        light, dark = file.read().split("@media (prefers-color-scheme: dark)")
    from winnow.bench.lifecycle.config import _STAGE_KINDS, KINDS

    for kind in (*KINDS.values(), *_STAGE_KINDS.values(), "several stages", "peer"):
        for theme, back, on in ((light, "#ffffff", "#ffffff"), (dark, "#10151c", "#10151c")):
            colour = re.search(rf"\.{kind_class(kind)}(?:,[^{{]*)? {{ --k: (#\w+)", theme)[1]
            # Text in the colour of the page stands on it: WCAG's 4.5 to 1.
            assert contrast(colour, on) >= 4.5, (kind, colour)
            assert contrast(colour, back) >= 3.0


def contrast(one, other):
    def light(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mark(number, x, y):
    return svg.Mark(number=number, kind="k", x=x, y=y, low=y, high=y, title="")


def test_the_line_joins_what_nothing_beats():
    marks = [mark(1, 3.0, 0.9), mark(2, 1.0, 0.5), mark(3, 2.0, 0.4), mark(4, 4.0, 0.9), mark(5, 1.0, 0.2)]
    assert [m.number for m in svg.pareto(marks)] == [2, 1]


@pytest.mark.parametrize("high", [0.003, 0.9, 7.0, 1.3e9])
def test_ticks_are_round_and_inside(high):
    ticks = svg.Scale(low=0.0, high=high, start=0, stop=100).ticks()
    assert 3 <= len(ticks) <= 7
    assert all(0 <= tick <= high * 1.001 for tick in ticks)


def test_numbers_of_close_points_do_not_cover_each_other():
    drawn = svg.scatter([mark(i, 1.0 + 0.001 * i, 1.0) for i in range(9)], title="t", x_name="x", x_text=str)
    badges = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="7.5"', drawn)
    places = [(float(x), float(y)) for x, y in badges]
    assert len(places) == 9
    for i, (x, y) in enumerate(places):
        assert all((x - a) ** 2 + (y - b) ** 2 > 15**2 for a, b in places[:i])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("scheme", "width"), [(0, 390), (1, 1400)])
def test_it_opens_in_a_browser_without_errors_and_fits_its_width(summary, tmp_path, scheme, width):
    told = page(summary).replace(
        "</body>",
        "<script>const w = document.documentElement;"
        "document.title = `wide ${w.scrollWidth - w.clientWidth} dark "
        "${matchMedia('(prefers-color-scheme: dark)').matches}`;</script></body>",
    )
    (tmp_path / "report.html").write_text(told, encoding="utf-8")
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--enable-logging=stderr"),
        *(f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom"),
        (tmp_path / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(wide.*?)</title>", done.stdout)
    assert title is not None
    assert title[1] == f"wide 0 dark {'true' if scheme == 0 else 'false'}"
