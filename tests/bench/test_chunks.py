"""The benchmark of chunks: cutting loses nothing, and its rows add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from winnow.bench.chunks import RECIPES, cut, main


def test_cut_keeps_every_line() -> None:
    text = "".join(f"line {i}\n" for i in range(37)) + "end"
    for pieces in (1, 2, 4, 9):
        found = cut(text, pieces)
        assert "".join(found) == text
        assert pieces - 1 <= len(found) <= pieces + 1
        assert all(piece.endswith("\n") for piece in found[:-1])


@pytest.mark.slow
def test_rows_add_up(tmp_path: Path, capsys) -> None:
    out = tmp_path / "chunks.json"
    assert (
        main(["--tokens", "768", "--documents", "1", "--turns", "1", "--pieces", "3", "--out", str(out)]) == 0
    )
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == list(RECIPES)
    full, reuse, blend, small = report["rows"]
    assert full["tokens_approximate"] == full["tokens_reused"] == full["bytes_pool"] == 0
    for row in report["rows"]:
        assert row["questions"] == len(row["seconds"]) == 2
        sums = row["tokens_computed"] + row["tokens_reused"] + row["tokens_approximate"]
        assert sums == full["tokens_computed"]
    assert reuse["tokens_repaired"] == 0 < blend["tokens_repaired"] < blend["tokens_approximate"]
    assert reuse["score_entries"] < blend["score_entries"] < full["score_entries"]
    # Memory comes in whole pages, so chunks of this size shrink by less than their codec.
    assert small["bytes_pool"] < 0.75 * blend["bytes_pool"]
    assert "CacheBlend, 4 bits" in capsys.readouterr().out
