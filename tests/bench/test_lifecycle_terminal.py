"""The commands in a terminal: options, the live table, time left, and what an interruption says."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from winnow.bench.lifecycle import live
from winnow.bench.lifecycle.config import default, units
from winnow.bench.lifecycle.record import ExampleRecord, Reply, TurnRecord
from winnow.bench.lifecycle.run import State
from winnow.cli.app import app
from winnow.cli.bench_lifecycle import _listed, _numbers, interpreters


def words(text):
    return len(text.split())


@pytest.fixture
def state():
    config = default(
        tasks=["kv"], lengths=[512, 1024], examples=1, turns=1, recipes=["sparse-read"], peers=["hf:dynamic"]
    )
    return State(config=config, units=units(config, words))


def finish(state, name, unit, seconds):
    reply = Reply(
        text="x",
        finish_reason="stop",
        tokens_computed=unit.length,
        tokens_reused=0,
        tokens_generated=3,
        time_to_first_token=0.5,
        decode_seconds=0.1,
        bytes_stored={"host/raw": 1_500_000},
    )
    record = ExampleRecord(
        system=name,
        mode=unit.mode,
        task=unit.task,
        category="string",
        length=unit.length,
        number=unit.number,
        checksum="c",
        turns=(TurnRecord(turn=1, depth=0.5, score=1.0, reply=reply),),
        seconds=seconds,
    )
    state.records[record.key] = record


def test_time_left_comes_from_what_is_done(state):
    assert live.seconds_left(state) is None
    assert len(state.outstanding) == 12
    short = [unit for unit in state.units if unit.length == 512]
    finish(state, "full", short[0], 2.0)
    # five more of 512 tokens at 2 s, and six of twice the length, taken for twice as long
    assert live.seconds_left(state) == pytest.approx(5 * 2.0 + 6 * 4.0)
    long = next(unit for unit in state.units if unit.length == 1024)
    finish(state, "full", long, 10.0)
    assert live.seconds_left(state) == pytest.approx(5 * 2.0 + 5 * 10.0)
    state.missing["hf:dynamic"] = "not here"
    assert live.seconds_left(state) == pytest.approx(3 * 2.0 + 3 * 10.0)


def test_a_terminal_gets_a_table_and_a_file_gets_lines(state):
    finish(state, "full", state.units[0], 90.0)
    state.missing["hf:dynamic"] = "not here"
    state.now = "sparse-read, kv"
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with live.follow(terminal) as watch:
        watch(state)
    shown = terminal.file.getvalue()
    for text in ("full", "100 %", "1.5 MB", "missing", "1 of 8 examples", "min", "now sparse-read, kv"):
        assert text in shown
    plain = Console(file=io.StringIO(), width=60)
    with live.follow(plain) as watch:
        watch(state)
        assert plain.file.getvalue() == "", "a line every half minute is enough"
        for name in state.config.systems:
            for unit in state.units:
                finish(state, name, unit, 1.0)
        watch(state)
    assert plain.file.getvalue() == "8 of 8 examples\n"


def test_lists_keep_the_parameters_of_a_recipe_together():
    assert _listed(["a-shape:init=64,local=448,snapkv:keep=96", "full"]) == [
        *("a-shape:init=64,local=448", "snapkv:keep=96", "full")
    ]
    assert _listed(["kv, vt"]) == ["kv", "vt"]
    assert _listed(None) is None
    assert _numbers(["1K,512", "2k"]) == [1024, 512, 2048]
    with pytest.raises(ValueError, match="cannot read the length '4X'"):
        _numbers(["4X"])
    assert interpreters(["/a/python", "kvpress=/b/python"]) == {"": "/a/python", "kvpress": "/b/python"}


def test_the_commands_run_and_print_one_document(tmp_path):
    runner = CliRunner()
    options = [
        "--tasks",
        "kv",
        "--lengths",
        "512",
        "--examples",
        "1",
        "--turns",
        "2",
        "--recipes",
        "sparse-read",
    ]
    found = []
    for name in ("a", "b"):
        result = runner.invoke(app, ["bench", "lifecycle", *options, "--out", str(tmp_path / name), "--json"])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    assert {system["name"] for system in found[0]["systems"]} == {"full", "sparse-read"}
    files = [str(tmp_path / name / "lifecycle.json") for name in ("a", "b")]
    assert json.loads((tmp_path / "a" / "lifecycle.json").read_text(encoding="utf-8")) == found[0]
    result = runner.invoke(app, ["bench", "compare", *files, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["verdict"] for row in rows if row["kind"] != "time"} == {"same"}
    result = runner.invoke(app, ["bench", "compare", *files])
    assert "sparse-read" in result.stdout


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch):
    from winnow.bench.lifecycle import run

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    result = CliRunner().invoke(app, ["bench", "lifecycle", "--out", str(tmp_path)])
    assert result.exit_code != 0
    assert "--resume" in result.stderr
