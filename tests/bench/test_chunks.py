"""The benchmark of chunks: cutting loses nothing, questions are of their kind, and the rows add up."""

from __future__ import annotations

from itertools import chain

import pytest

from winnow.bench import chunks, readme
from winnow.bench.chunks import CONTENDERS, FULL, GROUPS, cut, embedded_cases


def test_cut_keeps_every_line() -> None:
    text = "".join(f"line {i}\n" for i in range(37)) + "end"
    for pieces in (1, 2, 4, 9):
        found = cut(text, pieces)
        assert "".join(found) == text
        assert pieces - 1 <= len(found) <= pieces + 1
        assert all(piece.endswith("\n") for piece in found[:-1])


def test_questions_rest_on_what_their_group_says() -> None:
    cases = list(embedded_cases(tokens=700, pieces=8, questions=4, turns=3, seed=1))
    assert [case.group for case in cases] == [group for group in GROUPS.values() for _ in range(2)]
    for case in cases:
        pieces = list(chain.from_iterable(case.units))
        for _, turn in case.asks:
            assert turn is not None
            text = "".join(str(piece) for piece in pieces)
            lines = [text[first:last] for first, last in turn.sources]
            homes = [next(i for i, piece in enumerate(pieces) if line in str(piece)) for line in lines]
            assert len(set(homes)) == (1 if case.group == GROUPS["needles"] else 2)
            if case.group == GROUPS["joint-recall"]:
                # The heading's chunk and the line's are the two of one unit, so no order separates them.
                assert [str(piece).startswith("context ") for piece in pieces] == [True, False] * 4
                assert homes[1] == homes[0] + 1
                assert homes[0] % 2 == 0


def test_rows_add_up() -> None:
    report = chunks.run(tokens=500, pieces=4, questions=2, turns=2)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == list(CONTENDERS)
    full, none, five, half = (
        rows[name] for name in (FULL, "chunks, no repair", "CacheBlend 5 %", "CacheBlend 50 %")
    )
    assert full["tokens_approximate"] == full["tokens_reused"] == full["bytes_pool"] == 0
    assert full["over_full"] == 1
    for row in rows.values():
        sums = row["tokens_computed"] + row["tokens_reused"] + row["tokens_approximate"]
        assert sums == full["tokens_computed"]
        samples = row["samples"]
        assert {len(column) for column in samples.values()} == {6}
        for group, share in row["right"].items():
            asked = [
                right for right, of in zip(samples["right"], samples["group"], strict=True) if of == group
            ]
            assert share["mean"] == sum(asked) / len(asked)
            assert share["turns"] == len(asked) == 2
    assert rows["prefix reuse"]["tokens_approximate"] == 0
    assert none["tokens_repaired"] == 0 < five["tokens_repaired"] < half["tokens_repaired"]
    assert none["score_entries"] < five["score_entries"] < half["score_entries"] < full["score_entries"]
    assert full["right"] == {group: full["right"][group] for group in GROUPS.values()}
    assert all(share["mean"] == 1 for share in full["right"].values())
    # One pool for all that store chunks alike.
    assert none["bytes_pool"] == five["bytes_pool"] == half["bytes_pool"] > 0
    assert rows["CacheBlend 15 %, 4 bits"]["bytes_pool"] not in (0, half["bytes_pool"])
    assert chunks.table(report).row_count == len(CONTENDERS)
    written = readme.chunks(report, "chunks.json")
    assert "winnow bench chunks --model embedded --contender 'prefix reuse'" in written
    assert written.count("\n| ") == len(CONTENDERS)


def test_a_random_model_is_timed_only() -> None:
    report = chunks.run(model="tiny", contenders=["CacheBlend 15 %"], tokens=256, pieces=4, questions=3)
    full, blend = report["rows"]
    assert full["right"] == blend["right"] == {}
    assert report["chunk_tokens"] == 256
    assert len(blend["samples"]["seconds"]) == 3
    assert blend["tokens_repaired"] == (256 - 64) * 15 // 100
    assert chunks.table(report).row_count == 2
    assert "Right answers" not in readme.chunks(report, "chunks.json")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"contenders": ["nobody"]}, "unknown contender"),
        ({"pieces": 2}, "at least 4 pieces"),
        ({"model": "2b"}, "unknown preset"),
    ],
)
def test_refuses(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunks.run(**wrong)  # type: ignore[arg-type]
