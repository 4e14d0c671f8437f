"""SwiftKV in the benchmarks: rows that add up, and a recipe that the lifecycle benchmark can hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from winnow.bench.lifecycle import run as lifecycle
from winnow.bench.lifecycle.config import Config
from winnow.bench.swiftkv import forms, main


def test_rows_add_up(tmp_path: Path, capsys) -> None:
    out = tmp_path / "swiftkv.json"
    assert main(["--preset", "tiny", "--tokens", "300", "--rounds", "2", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    full, most, half, group = report["rows"]
    assert [row["name"] for row in report["rows"]] == list(forms(4))
    assert all(len(row["first_token"]) == len(row["decode"]) == 2 for row in report["rows"])
    assert full["over_full"] == full["multiplications"] == 1.0
    # Nobody reads what the last layer makes of a prompt's rows, so that leaving it out saves nothing.
    assert 1.0 == most["multiplications"] > half["multiplications"] > group["multiplications"] > 0.5
    # Of four layers prompts pass three or two; in the others there is the prompt's last row alone.
    heads, square = 4, 300 * 301 // 2
    assert full["score_entries"] == most["score_entries"] == heads * (3 * square + 300)
    assert half["score_entries"] == group["score_entries"] == heads * (2 * square + 2 * 300)
    assert full["bytes_stored"] == most["bytes_stored"] == half["bytes_stored"]
    assert 4 * group["bytes_stored"] == 3 * full["bytes_stored"]
    assert len({row["bytes_read"] for row in report["rows"]}) == 1
    assert "swiftkv:layers=2,group=2" in capsys.readouterr().out


@pytest.mark.slow
def test_the_lifecycle_benchmark_transforms_the_model(tmp_path: Path) -> None:
    config = Config(
        tasks=("kv",),
        lengths=(512,),
        recipes=("swiftkv", "swiftkv:layers=6"),
        modes=("multi-turn",),
        examples=1,
        turns=2,
    )
    samples = lifecycle.run(config, tmp_path)["samples"]
    system, count = (samples["columns"].index(name) for name in ("system", "score_entries"))
    scores: dict[str, int] = Counter()
    for row in samples["rows"]:
        scores[row[system]] += row[count]
    assert scores["swiftkv:layers=6"] == scores["full"]
    # Prompts pass three layers of five: the last one takes the last row alone under every recipe.
    assert 0.6 * scores["full"] < scores["swiftkv"] < 0.7 * scores["full"]
