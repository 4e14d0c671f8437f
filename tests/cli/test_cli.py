"""The command line as a person meets it: answers, JSON, one-line errors, exit codes."""

from __future__ import annotations

import io
import json
import sys

import pytest

from winnow.cli import main
from winnow.models.embedded import documents


@pytest.fixture
def winnow(monkeypatch, capsys):
    """Run a command; returns its exit code, stdout and stderr."""

    def call(*words: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["winnow", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin if stdin is not None else ""))
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def question():
    document = documents.make("key-value", tokens=600, seed=3, turns=2, facts=8)
    return document, documents.prompt(document, 0)


def test_run_answers_from_standard_input(winnow, question):
    document, prompt = question
    code, out, _ = winnow("run", "embedded", "-n", "12", "--stop", "\n", stdin=prompt)
    assert code == 0
    assert documents.score(document.turns[0], out)


def test_run_with_file_and_json_reports_what_it_cost(winnow, question, tmp_path):
    document, prompt = question
    path = tmp_path / "prompt.txt"
    path.write_text(prompt, encoding="utf-8")
    code, out, _ = winnow(
        "run", "embedded", "-f", str(path), "-n", "12", "--stop", "\n", "--json", "--recipe", "four-stages"
    )
    report = json.loads(out)
    assert code == 0
    assert report["stats"]["tokens_computed"] == report["prompt_tokens"]
    assert set(report["recipe"]) >= {"generation", "compression", "retrieval", "loading"}
    assert documents.score(document.turns[0], report["samples"][0]["text"])


def test_chat_about_a_file_keeps_the_conversation(winnow, question, tmp_path):
    document, _ = question
    path = tmp_path / "document.txt"
    path.write_text(document.text, encoding="utf-8")
    lines = [turn.question for turn in document.turns]
    code, out, _ = winnow("chat", "embedded", "-f", str(path), "-n", "12", "--json", stdin="\n".join(lines))
    assert code == 0
    decoder, answers, at = json.JSONDecoder(), [], 0
    while at < len(out.rstrip()):
        value, at = decoder.raw_decode(out, at)
        answers.append(value)
        at += 1
    assert [a["message"] for a in answers] == lines
    for turn, answer in zip(document.turns, answers, strict=True):
        assert documents.score(turn, answer["samples"][0]["text"])
    # The document is read once: the second turn computes its own line, and little more.
    assert answers[1]["stats"]["tokens_reused"] > 500
    assert answers[1]["stats"]["tokens_computed"] < 30


def test_methods_table_and_json(winnow):
    code, out, _ = winnow("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert {"a-shape", "anchor-attention", "snapkv", "tidal-decode", "prefix-reuse"} <= set(rows)
    assert all(row["paper"] and row["stage"] for row in rows.values())
    assert "snapkv" in winnow("methods")[1]


def test_recipe_show_is_yaml_that_check_takes_back(winnow, tmp_path):
    code, out, _ = winnow("recipe", "show", "four-stages")
    assert code == 0
    path = tmp_path / "mine.yaml"
    path.write_text(out, encoding="utf-8")
    shown = json.loads(winnow("recipe", "check", "four-stages", "--json")[1])
    again = json.loads(winnow("recipe", "check", str(path), "--json")[1])
    assert again["fingerprint"] == shown["fingerprint"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("recipe", "check", "snapvk"), "snapkv"),
        (("run", "embeded", "-p", "x"), "embedded"),
        (("run", "embedded", "-f", "/nowhere/at/all"), "no file"),
        (("run", "embedded", "-p", ""), "empty"),
        (("run", "embedded", "-p", "x", "--recipe", "nothing-like-it.yaml"), "nothing-like-it.yaml"),
        (("run", "embedded", "-p", "x", "--temperature", "-1"), "temperature"),
        (("run", "embedded", "-p", "x", "--backend", "cuda"), "backend"),
        (("bench", "end-to-end", "--contender", "nobody"), "nobody"),
    ],
)
def test_errors_are_one_line_with_a_remedy(winnow, words, says):
    code, out, err = winnow(*words)
    assert code == 2
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("winnow: ")
    assert says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("compression:\n  compres: {}\n", "compress"),
        ("compresion: {}\n", "compression"),
        ("methods: {snapkv: {keep: 0}}\n", "keep"),
        ("methods: {snapkv: {kep: 100}}\n", "keep"),
        ("generation: [\n", "YAML"),
    ],
)
def test_bad_recipes_name_the_nearest(winnow, tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    code, _, err = winnow("recipe", "check", str(path))
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert says in err


def test_unknown_options_are_usage_errors(winnow):
    code, _, err = winnow("run", "embedded", "--nonsense")
    assert code == 2
    assert "--nonsense" in err


def test_help_and_version_need_no_model(winnow):
    assert "0.1.0" in winnow("--version")[1]
    for words in ((), ("run",), ("chat",), ("demo",), ("methods",), ("recipe",), ("bench",)):
        code, out, _ = winnow(*words, "--help")
        assert code == 0
        assert "Usage" in out
