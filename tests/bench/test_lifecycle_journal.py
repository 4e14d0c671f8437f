"""The journal survives what kills a run, and never mixes two."""

from __future__ import annotations

import json

import pytest

from winnow.bench.lifecycle.journal import NAME, entries, open_journal

HEADER = {"fingerprint": "a", "model": "m"}


def write(directory, count, *, resume=False):
    with open_journal(directory, HEADER, resume=resume) as (journal, earlier):
        for i in range(count):
            journal.write("example", {"i": len(earlier) + i, "text": "line\nbreak \u2028"})
    return earlier


def test_lines_are_whole_and_in_order(tmp_path):
    write(tmp_path, 3)
    found = entries(tmp_path)
    assert [e["kind"] for e in found] == ["header", "example", "example", "example"]
    assert found[1]["text"] == "line\nbreak \u2028"
    assert len((tmp_path / NAME).read_text(encoding="utf-8").split("\n")) == 5


@pytest.mark.parametrize("torn", [b'{"kind": "exam', b'{"kind": "exam\n', b"\x00\x00\x00", b"\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path, 2)
    with (tmp_path / NAME).open("ab") as file:
        file.write(torn)
    assert [e["kind"] for e in entries(tmp_path)] == ["header", "example", "example"]
    write(tmp_path, 1, resume=True)
    assert [e["kind"] for e in entries(tmp_path)] == ["header", "example", "example", "resumed", "example"]


def test_every_cut_of_the_last_line_leaves_the_others(tmp_path):
    write(tmp_path, 2)
    whole = (tmp_path / NAME).read_bytes()
    last = len(whole.rstrip(b"\n").rpartition(b"\n")[0]) + 1
    for end in range(last, len(whole)):
        (tmp_path / NAME).write_bytes(whole[:end])
        assert [e["kind"] for e in entries(tmp_path)] == ["header", "example"]


def test_a_damaged_line_before_the_last_is_refused(tmp_path):
    write(tmp_path, 3)
    lines = (tmp_path / NAME).read_bytes().split(b"\n")
    lines[2] = lines[2][:10]
    (tmp_path / NAME).write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"line 3 of .* is damaged"):
        entries(tmp_path)


def test_another_run_is_not_overwritten(tmp_path):
    write(tmp_path, 1)
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(ValueError, match="--resume"), open_journal(tmp_path, HEADER, resume=False):
        pass
    other = {**HEADER, "fingerprint": "b"}
    with pytest.raises(ValueError, match="something else"), open_journal(tmp_path, other, resume=True):
        pass
    assert (tmp_path / NAME).read_bytes() == before


def test_two_runs_do_not_write_at_once(tmp_path):
    with (
        open_journal(tmp_path, HEADER, resume=False),
        pytest.raises(ValueError, match="another run is writing"),
        open_journal(tmp_path, HEADER, resume=True),
    ):
        pass


def test_a_run_that_died_before_its_header_starts_anew(tmp_path):
    (tmp_path / NAME).write_bytes(json.dumps({"kind": "header"}).encode()[:7])
    assert write(tmp_path, 1) == []
    assert [e["kind"] for e in entries(tmp_path)] == ["header", "example"]
