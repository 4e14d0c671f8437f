"""The load test and the soak: what they measure, and that they can fail."""

from __future__ import annotations

import copy
import random
from collections import Counter
from itertools import pairwise
from statistics import median

import pytest

from tests.serve.conftest import running
from winnow.bench import serve, soak
from winnow.bench.serve_load import Exchange, drive, summary, workload
from winnow.bench.serve_model import words, write_model
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


def test_unknown_servers_are_refused():
    with pytest.raises(ValueError, match="unknown server"):
        serve.run(servers=("vllm",))


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
    assert "sequences" in spoilt(kv_idle={"host/pool": 0, "host/raw": 4096})[0]
    assert (
        "ended badly" in spoilt(ends={**report["ends"], "whole": 0, "cut short": report["ends"]["whole"]})[0]
    )
    assert "peaked" in spoilt(kv_peak=report["kv_limit"] + 1)[0]
