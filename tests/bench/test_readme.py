"""The README's tables are what the committed runs say, and the demo measures what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from winnow.bench import demo, end_to_end, output, readme

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("place", readme.TABLES, ids=lambda place: place.mark)
def test_pages_show_the_committed_runs(place: readme.Place) -> None:
    page = (ROOT / place.page).read_text(encoding="utf-8")
    assert f"<!-- {place.mark}: begin -->" in page
    assert place.on(ROOT, page) == page, "run python -m winnow.bench.readme"


def test_the_pictures_are_there() -> None:
    for image in ("docs/images/demo.png", "docs/images/embedded-heads.png"):
        assert (ROOT / image).stat().st_size > 5000


def test_a_small_demo_counts_every_answer(tmp_path):
    steps = []
    report = demo.run(
        tokens=700,
        documents=1,
        turns=2,
        recipes=["sparse-read"],
        progress=lambda *step: steps.append(step),
    )
    assert [row["name"] for row in report["rows"]] == ["full attention", "sparse-read"]
    assert [step[1] for step in steps] == list(range(1, 13))
    full, sparse = report["rows"]
    assert full["right"] == [6, 6]
    assert sparse["bytes_read_per_token"] < full["bytes_read_per_token"]
    out = tmp_path / "results" / "demo.json"
    output.save(report, out)
    assert json.loads(out.read_text())["config"]["tokens"] == 700
    assert demo.table(report).row_count == 2
    readme.draw(report, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 5000


def test_end_to_end_measures_every_contender_in_one_run():
    report = end_to_end.run(
        contenders=["hf static", "hf dynamic", "winnow full", "winnow search", "reading it all once"],
        decode_at=1024,
        prefill=256,
        preset="tiny",
        rounds=2,
        tokens=2,
        memory=False,
    )
    torch_alone, ours = ["hf static", "hf dynamic"], ["winnow full", "winnow search"]
    assert list(report["decode"]) == [*torch_alone, *ours, "reading it all once"]
    assert list(report["prefill"]) == ["hf dynamic", "winnow full"]
    for rows in (report["decode"], report["prefill"]):
        base = next(iter(rows.values()))["seconds"]
        for row in rows.values():
            assert row["seconds"] > 0
            assert row["over_baseline"] == pytest.approx(base / row["seconds"])
    assert len(report["decode"]["winnow full"]["samples"]) == 2
    assert len(end_to_end.tables(report)) == 2


def test_unknown_contender_is_refused():
    with pytest.raises(ValueError, match="there are"):
        end_to_end.run(contenders=["nobody"])
