"""The kernel benchmark: what its JSON says follows from its raw samples."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from winnow.bench import kernel_cases, kernels, machine, report
from winnow.kernels import backend

pytestmark = pytest.mark.skipif(not backend.isas(), reason="the native kernels were not built")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "deep" / "kernels.json"
    told: list[tuple[str, int, int]] = []
    returned = kernels.run(quick=True, out=path, progress=lambda *what: told.append(what))
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2] == len(returned["samples"])
    written: dict[str, Any] = json.loads(path.read_text())
    assert written == json.loads(json.dumps(returned))
    assert path.with_suffix(".svg").exists()
    return written


def test_every_operation_is_measured_beside_limit_and_pytorch(result: dict[str, Any]) -> None:
    ours = [row for row in result["rows"] if row["ours"]]
    assert {row["op"] for row in ours} == set(kernels.OPS)
    for row in ours:
        assert row["of_limit"] > 0
        assert row["limit"] in ("matrix product", "read")
    for op in kernels.OPS:
        assert any(row["versus_pytorch"] for row in ours if row["op"] == op), op


def test_rows_follow_from_the_raw_samples(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        samples = result["samples"][row["group"]]
        seconds = samples["contenders"][row["name"]]
        assert len(seconds) == len(samples["limit"]) >= 3
        assert row["seconds"] == statistics.median(seconds)
        shares = [row["work"] / s / limit for s, limit in zip(seconds, samples["limit"], strict=True)]
        assert math.isclose(row["of_limit"], statistics.median(shares), rel_tol=1e-9)
        if row["pytorch"]:
            theirs = samples["contenders"][row["pytorch"]]
            times = [b / a for a, b in zip(seconds, theirs, strict=True)]
            assert math.isclose(row["versus_pytorch"], statistics.median(times), rel_tol=1e-9)


def test_it_says_what_it_ran_on(result: dict[str, Any]) -> None:
    said = result["machine"]
    assert said["versions"]["torch"] == torch.__version__
    assert said["instruction_set"] in said["instruction_sets"]
    assert said["cores"] >= 1
    assert result["limits"]["read_bytes_per_second"] > 0
    assert set(result["config"]["groups"]) == set(result["samples"])
    assert machine.slug(said) == machine.slug(said).lower().strip("-")


def test_quick_judges_no_floors_and_the_table_prints(result: dict[str, Any]) -> None:
    assert all(not row["floors"] for row in result["rows"])
    console = Console(width=200, record=True)
    console.print(report.table(result))
    text = console.export_text()
    for row in result["rows"]:
        assert row["name"] in text


def test_floors_are_judged_by_what_was_measured() -> None:
    seconds = {"dense": 0.004, "ours": 0.001, "theirs": 0.002}
    contenders = tuple(
        kernel_cases.Contender(
            name=name,
            op="decode",
            run=lambda: None,
            work=1.0,
            baselines=("theirs",) if name == "ours" else (),
            floors=(("dense", 1.5), ("pytorch", 1.1), ("pytorch", 1e3)) if name == "ours" else (),
        )
        for name in seconds
    )
    group = kernel_cases.Group(
        name="naps", limit="read", reads=(torch.ones(8),), contenders=contenders, config={}
    )
    # The machine runs at another speed in every repetition; only quotients inside one may count.
    slowness = (1.0, 30.0, 7.0)
    measured = {
        "limit": [1 / s for s in slowness],
        "contenders": {name: [each * s for s in slowness] for name, each in seconds.items()},
    }
    rows = {row["name"]: row for row in kernels._rows(group, contenders, measured)}
    assert [f["met"] for f in rows["ours"]["floors"]] == [True, True, False]
    assert rows["ours"]["pytorch"] == "theirs"
    assert math.isclose(rows["ours"]["versus_dense"], 4)
    assert math.isclose(rows["ours"]["versus_pytorch"], 2)
    assert math.isclose(rows["ours"]["of_limit"], 1000)


def test_one_operation_brings_what_it_is_compared_with() -> None:
    result = kernels.run(quick=True, ops=["top_k"])
    assert {row["name"] for row in result["rows"]} == {"top-k", "torch.topk"}


def test_random_patterns_have_the_density_they_claim() -> None:
    blocks = kernel_cases._random_blocks(2, 4096, 64, 25)
    assert abs(blocks.columns.numel() / (2 * 64 * 65 / 2) - 0.25) < 0.02
    stripes = kernel_cases._random_stripes(2, 4096, 512, 10)
    assert abs(stripes.columns.numel() / (2 * 512 * 8 * 9 / 2) - 0.10) < 0.01


def test_refusals() -> None:
    with pytest.raises(ValueError, match="did you mean 'matvec'"):
        kernels.run(ops=["matvek"])


def test_the_guide_takes_the_table(result: dict[str, Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "kernels.md").read_text()
    inserted = report.insert(page, result)
    assert inserted == report.insert(inserted, result)
    for row in result["rows"]:
        assert (f"| {row['name']} |" in inserted) == row["ours"]


def test_figure_is_drawn_from_the_json_alone(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw(result, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
