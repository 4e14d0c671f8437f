"""The benchmark of workers: what is stored and read once is counted once, and answers are judged."""

from __future__ import annotations

import pytest

from winnow.bench import readme, workers


def test_a_shared_text_is_stored_and_read_once() -> None:
    entries, steps = 1500, 3
    report = workers.run(model="tiny", entries=entries, steps=steps, rounds=2)
    rows = {(row["name"], row["readers"]): row for row in report["rows"]}
    one = 2 * 4 * 2 * 16 * 2  # bytes of a token: K and V, layers, KV heads, head size, bfloat16
    for n in workers.COUNTS:
        copies, ours = rows["sequences", n], rows["workers", n]
        assert copies["bytes_stored"] >= n * entries * one
        assert entries * one <= ours["bytes_stored"]
        # Of the text one worker's share, of what is written all of it: that grows from 1 to `steps` each.
        written = one * n * sum(range(1, steps + 1)) / (n * steps)
        assert ours["bytes_read_per_token"] == entries * one / n + written
        # A sequence read its first token before its steps begin.
        assert copies["bytes_read_per_token"] == entries * one + one * (sum(range(2, steps + 2)) / steps)
        assert ours["over_one"] > 0
        assert ours["tokens_per_second"] == n / ours["step_seconds"]
    assert rows["sequences", 1]["over_one"] == 1
    samples = rows["samples of one prompt", 4]
    assert samples["bytes_stored"] < 2 * rows["sequences", 1]["bytes_stored"]
    assert samples["bytes_read_per_token"] == rows["sequences", 4]["bytes_read_per_token"]
    assert report["quality"] is None
    assert len(workers.tables(report)) == 1
    assert "--model tiny --entries 1500" in readme.workers(report, "workers.json")


def test_answers_on_the_embedded_model() -> None:
    report = workers.run(entries=400, steps=2, rounds=1, documents=2, tokens=600)
    quality = {(row["kind"], row["workers"]): row for row in report["quality"]}
    assert {key[1] for key in quality if key[0] == "own questions"} == set(workers.COUNTS)
    for row in quality.values():
        assert row["right"]["turns"] == 8
        assert row["right"]["mean"] == sum(map(sum, row["samples"])) / 8
    assert quality["own questions", 1]["right"]["mean"] == 1
    # Gone from the document, it is nowhere but in what the other read.
    assert quality["a fact that nobody was told", 2]["right"]["mean"] < 0.5
    assert quality["a fact that the other read before", 2]["right"]["mean"] == 1
    assert report["limit"] is None
    assert len(workers.tables(report)) == 2
    assert "8 questions about 2 documents" in readme.workers_answers(report, "workers.json")


def test_refuses() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        workers.run(steps=0)
