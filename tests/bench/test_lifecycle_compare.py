"""Comparing two runs: a real change is flagged, noise is not, counts are exact."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from winnow.bench.lifecycle import compare
from winnow.bench.lifecycle.summary import COLUMNS

MACHINE = {"cpu": {"name": "processor"}, "cores": 2, "threads": 2, "commit": "abc", "time": "now"}


def run(examples=16, turns=4, seed=0, right=0.8, seconds=1.0, stored=1000, machine=MACHINE):
    """A run of one system with scores and times drawn at random."""
    random = np.random.default_rng(seed)
    rows = []
    for example in range(examples):
        for turn in range(1, turns + 1):
            sample = {
                **dict.fromkeys(COLUMNS),
                "system": "snapkv",
                "mode": "multi-turn",
                "checksum": f"{example:016x}",
                "turn": turn,
                "score": float(random.random() < right),
                "tokens_generated": 5,
                "time_to_first_token": seconds * random.lognormal(0, 0.1),
                "decode_seconds": 0.1 * seconds * random.lognormal(0, 0.1),
                "score_entries": 100 * turn,
                "bytes_stored": stored * turn,
                "bytes_read": stored,
            }
            rows.append([sample[name] for name in COLUMNS])
    return {
        "fingerprint": f"f{seed}",
        "machine": machine,
        "samples": {"columns": list(COLUMNS), "rows": rows},
    }


def verdicts(first, second):
    return {row["measure"]: row["verdict"] for row in compare.compare(first, second)["rows"]}


def test_a_run_equals_itself():
    found = verdicts(run(), run())
    assert set(found.values()) == {"same"}
    assert set(found) == {*compare.QUALITY, *compare.TIMED, *compare.COUNTED}


def test_noise_is_called_noise():
    found = verdicts(run(seed=1), run(seed=2))
    assert {found[name] for name in (*compare.QUALITY, *compare.TIMED)} == {"noise"}
    assert {found[name] for name in compare.COUNTED} == {"same"}


def test_a_real_change_is_flagged_with_its_direction():
    found = verdicts(run(seed=1, right=0.9), run(seed=2, right=0.3, seconds=1.5, stored=500))
    assert found["score, later turns"] == "worse"
    assert {found[name] for name in compare.TIMED} == {"worse"}
    assert (found["KV stored"], found["KV read"], found["score entries"]) == ("less", "less", "same")
    back = verdicts(run(seed=2, right=0.3, seconds=1.5), run(seed=1, right=0.9))
    assert back["score, later turns"] == "better"
    assert {back[name] for name in compare.TIMED} == {"better"}


def test_false_alarms_keep_to_their_rate():
    alarms = sum(
        bool({"better", "worse"} & set(verdicts(run(seed=2 * i), run(seed=2 * i + 1)).values()))
        for i in range(40)
    )
    assert alarms <= 6, "two kinds of comparison, 5 % each"


def test_few_examples_cannot_tell():
    first, second = run(examples=3, right=1.0), run(examples=3, right=0.0, seed=5)
    assert verdicts(first, second)["score, later turns"] == "too few"


def test_only_shared_examples_count():
    first, second = run(examples=10), run(examples=12)
    report = compare.compare(first, second)
    assert report["notes"][1].startswith(
        "10 examples are shared; 0 are in the first run only, 2 in the second"
    )
    assert {row["examples"] for row in report["rows"]} == {10}
    other = copy.deepcopy(second)
    for row in other["samples"]["rows"]:
        row[COLUMNS.index("checksum")] += "x"
    with pytest.raises(ValueError, match="share no example"):
        compare.compare(first, other)


def test_times_of_different_machines_are_not_compared():
    elsewhere = {**MACHINE, "cpu": {"name": "another"}}
    report = compare.compare(run(), run(machine=elsewhere))
    assert not [row for row in report["rows"] if row["kind"] == "time"]
    assert any("different machines" in note for note in report["notes"])


def test_table_has_a_line_for_every_row_and_files_are_checked(tmp_path):
    report = compare.compare(run(seed=1), run(seed=2, stored=0))
    assert len(report["rows"]) == 7
    assert [table.row_count for table in compare.tables(report)] == [7]
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"cannot read .*a\.json"):
        compare.load(path)
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="no lifecycle run"):
        compare.load(path)
    path.write_text(json.dumps(run()))
    assert compare.load(path)["fingerprint"] == "f0"
