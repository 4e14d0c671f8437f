"""The load test and the soak: what they measure, and that they can fail."""

from __future__ import annotations

import copy
import io
import json
import random
from collections import Counter
from itertools import pairwise
from statistics import median

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.serve.conftest import running
from winnow.bench import serve, serve_report, serve_servers, soak
from winnow.bench.serve_load import Exchange, drive, summary, workload
from winnow.bench.serve_model import words, write_model
from winnow.cli import app as command_line
from winnow.models.load import load_model
from winnow.models.random import PRESETS

VOCABULARY = PRESETS["tiny"]["vocab_size"]
LOAD = {
    "clients": 6,
    "turns": 3,
    "prefix": 200,
    "question": 10,
    "answer": 5,
    "rate": 100.0,
    "vocabulary": VOCABULARY,
}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, "tiny")
    return load_model(directory)


def test_words_are_tokens_there_and_back(spoken):
    text = spoken[1]
    said = words(50, VOCABULARY, random.Random(0))
    ids = text.encode(said)
    assert len(ids) == 50
    assert text.decode(ids) == said


def test_conversations_are_timed_and_reuse_what_was_said(spoken):
    conversations = workload("multi-turn", **LOAD)
    with running(*spoken, max_model_len=4096) as server:
        port = int(server.url.rsplit(":", 1)[1])
        exchanges, seconds = drive(port, "tiny", conversations)
        told = server.worker.counters
    assert [one.error for one in exchanges] == [""] * 18
    assert all(one.tokens == 5 and 0 < one.first <= one.total for one in exchanges)
    assert sum(one.prompt_tokens for one in exchanges) == told.prompt_tokens
    assert sum(one.cached_tokens for one in exchanges) == told.reused_tokens
    # Later turns find all whole pages of what was said before, answers included.
    for one in exchanges:
        if one.turn:
            before = next(
                e for e in exchanges if (e.conversation, e.turn) == (one.conversation, one.turn - 1)
            )
            assert one.cached_tokens == (before.prompt_tokens + before.tokens) // 64 * 64
    report = summary(exchanges, seconds, first_deadline=60, token_deadline=60)
    assert report["goodput_per_second"] == pytest.approx(18 / seconds)
    assert 0.5 < report["hit_rate"] < 1


def test_goodput_counts_what_met_both_deadlines():
    def one(first: float, per_token: float, error: str = "") -> Exchange:
        total = first + 4 * per_token
        return Exchange(
            conversation=0, turn=0, begin=0, first=first, total=total, tokens=5, error=error, text="x"
        )

    exchanges = [one(1, 0.1), one(3, 0.1), one(1, 0.5), one(1, 0.1, "broken")]
    report = summary(exchanges, 10.0, first_deadline=2, token_deadline=0.2)
    assert report["goodput_per_second"] == 0.1
    assert report["answers_per_second"] == 0.3
    assert report["failed"] == 1
    assert report["hit_rate"] is None
    assert report["first_token"]["median"] == 1


def test_workloads_are_what_they_say_and_repeat():
    assert workload("mixed", **LOAD, seed=1) == workload("mixed", **LOAD, seed=1)
    many = workload("mixed", **{**LOAD, "clients": 400}, seed=1)
    shared = Counter(c.system for c in many).most_common(1)[0][0]
    kinds = [c.system == shared and len(c.questions) for c in many]
    assert 150 < sum(kind == 3 for kind in kinds) < 250
    assert any(c.system == "" for c in many)
    gaps = [b.arrival - a.arrival for a, b in pairwise(many)]
    # Exponential gaps: their median is ln 2 of their mean.
    assert 0.55 < median(gaps) * LOAD["rate"] < 0.85
    assert {len(c.questions) for c in workload("shared-prefix", **LOAD)} == {1}
    with pytest.raises(ValueError, match="workload"):
        workload("nonsense", **LOAD)


def measured(times: list[tuple[float, float]], seconds: float) -> dict:
    """A server as a run of any age has it in its JSON: answers of 5 tokens by first and per-token times."""
    samples = [
        Exchange(conversation=0, turn=i, begin=float(i), first=a, total=a + 4 * b, tokens=5)
        for i, (a, b) in enumerate(times)
    ]
    kept = [{k: v for k, v in vars(one).items() if k != "text"} for one in samples]
    return {
        **summary(samples, seconds, first_deadline=10, token_deadline=1),
        "samples": kept,
        "probe": {"ratio": 3.0},
        "peak_bytes": 1 << 30,
    }


def test_goodput_at_several_deadlines_comes_from_the_samples(tmp_path):
    config = {"workload": "mixed", "preset": "tiny", "clients": 4, "turns": 1, "prefix": 9}
    report = {
        "config": {**config, "first_deadline": 10.0, "token_deadline": 1.0},
        "servers": {
            "winnow": measured([(0.5, 0.1), (2, 0.1), (9, 0.1), (9, 0.1)], 20.0),
            "transformers": measured([(50, 0.1), (200, 0.1), (400, 0.1), (20, 5.0)], 400.0),
        },
    }
    before = copy.deepcopy(report)
    servers = serve_report.with_curves(report)["servers"]
    assert report == before
    ours, theirs = (
        {point["first_deadline"]: point for point in servers[name]["goodput"]}
        for name in ("winnow", "transformers")
    )
    assert [ours[d]["per_second"] for d in (1, 3, 10, 30, 300, None)] == [0.05, 0.1, 0.2, 0.2, 0.2, 0.2]
    # The last answer was slow to write: it counts only where there is no deadline at all.
    assert [theirs[d]["per_second"] for d in (10, 30, 100, 300, None)] == [0, 0, 0.0025, 0.005, 0.01]
    assert [theirs[d]["winnow_times"] for d in (1, 30)] == [None, None]
    assert [theirs[d]["winnow_times"] for d in (100, 300, None)] == pytest.approx([80, 40, 20])
    assert "winnow_times" not in ours[1]
    shown = io.StringIO()
    Console(file=shown, width=200).print(serve_report.table(report), serve_report.curve_table(report))
    assert "0.0025 (80.0 x)" in shown.getvalue()
    serve_report.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_an_earlier_run_is_shown_again(tmp_path):
    config = {"workload": "mixed", "preset": "tiny", "clients": 4, "turns": 1, "prefix": 9}
    report = {
        "config": {**config, "first_deadline": 7.0, "token_deadline": 1.0},
        "servers": {"winnow": measured([(6.5, 0.1)], 10.0)},
        "missing": {"transformers": "accelerate is missing"},
    }
    (tmp_path / "old.json").write_text(json.dumps(report))
    told = CliRunner().invoke(
        command_line.app, ["bench", "serve", "--again", str(tmp_path / "old.json"), "--json"]
    )
    assert told.exit_code == 0, told.output
    points = json.loads(told.stdout)["servers"]["winnow"]["goodput"]
    assert {p["first_deadline"]: p["per_second"] for p in points}[7.0] == 0.1


def test_servers_that_cannot_run_are_told_and_unknown_ones_refused():
    with pytest.raises(ValueError, match="unknown server"):
        serve.run(servers=("nonsense",))
    assert "--peer-python vllm=PATH" in serve_servers.missing("vllm", {})
    assert serve_servers.missing("vllm", {"vllm": "python"}) is None
    assert serve_servers.missing("winnow", {}) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["winnow", "llama.cpp"])
def test_servers_under_a_small_load(tmp_path, name):
    if why := serve_servers.missing(name, {}):
        pytest.skip(why)
    small = {"preset": "tiny", "clients": 3, "turns": 2, "prefix": 300, "question": 8, "answer": 6}
    report = serve.run(servers=(name,), rate=50.0, repeats=1, model=tmp_path / "model", **small)
    assert report["missing"] == {}
    found = report["servers"][name]
    assert (found["requests"], found["failed"]) == (6, 0)
    assert {one["tokens"] for one in found["samples"]} == {6}
    assert found["probe"]["hit"][0] > 0
    assert found["peak_bytes"] > 50 << 20
    assert str(tmp_path) not in found["command"]


@pytest.mark.slow
def test_a_short_soak_leaves_nothing_behind():
    report = soak.run(requests=90, clients=6, batch=30)
    assert soak.check(report) == []
    assert report["ends"]["left"] > 5
    assert report["server_ends"]["finished"] + report["server_ends"]["cancelled"] == 90

    def spoilt(**changes) -> list[str]:
        return soak.check({**copy.deepcopy(report), **changes})

    growing = [100 + 10 * i for i in range(20)]
    assert "grows" in spoilt(resident=growing)[0]
    assert spoilt(resident=[100] * 20) == []
    assert "accounted" in spoilt(kv_after_reset={"host/pool": 4096})[0]
    assert "sequences" in spoilt(kv_idle={**report["kv_idle"], "host/raw": 4096})[0]
    assert "still wait" in spoilt(kv_idle_elsewhere={"disk/swap": 1, "disk/pool": 1})[0]
    assert "swap peaked" in spoilt(swap_peak=report["swap_space"] + 1)[0]
    assert "the files took" in spoilt(kv_dir_bytes=[report["kv_dir_limit"] + 1])[0]
    assert "after a reset" in spoilt(kv_dir_files_after_reset=["x.kv"])[0]
    assert (
        "ended badly" in spoilt(ends={**report["ends"], "whole": 0, "cut short": report["ends"]["whole"]})[0]
    )
    assert "peaked" in spoilt(kv_peak=report["kv_limit"] + 1)[0]
