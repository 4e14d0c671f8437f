"""Published data, in small hand-made files of the published schemas."""

from __future__ import annotations

import builtins
import json
import sys
from dataclasses import replace

import pytest

from winnow.bench import published, repoqa_scorer
from winnow.bench.scorers import SCORERS
from winnow.bench.tasks import prompt


def count(text):
    return len(text.split())


def jsonl(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def grade(turn, answer):
    return SCORERS[turn.scorer](turn, answer)


def scbench(path, *rows, **more):
    return list(published.scbench(jsonl(path, *rows), count=count, **more))


def test_scbench_key_value(tmp_path):
    row = {
        "id": 3,
        "context": '{"ab": "cd", "ef": "gh"}',
        "multi_turns": [
            {"input": 'Key: "ab"\nThe value is', "answer": "cd"},
            {"input": "ef", "answer": "gh"},
        ],
    }
    (example,) = scbench(tmp_path / "scbench_kv.jsonl", row)
    assert (example.task, example.category, example.form) == ("scbench:kv", "string", "text")
    assert prompt(example, 1) == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        '{"ab": "cd", "ef": "gh"}\n\nKey: "ab"\nThe value iscd\n\nef'
    )
    assert example.length == count(example.opening)
    assert [turn.scorer for turn in example.turns] == ["string", "string"]
    assert example.turns[1].depth == row["context"].index("gh") / len(row["context"])
    assert example.turns[0].max_new_tokens == 150
    (scored,) = scbench(tmp_path / "scbench_kv.jsonl", row, published=True)
    assert [turn.scorer for turn in scored.turns] == ["scbench:kv", "scbench:kv"]
    assert scored.checksum != example.checksum


def test_scbench_multiple_choice(tmp_path):
    row = {
        "id": 0,
        "context": "A book.",
        "multi_turns": [{"input": "Who?", "answer": "Dan", "options": ["Ann", "Bob", "Cid", "Dan"]}] * 2,
    }
    (example,) = scbench(tmp_path / "scbench_choice_eng.jsonl", row)
    turn, second = example.turns
    assert turn.answers == ("D", "Dan")
    assert turn.question == "Who?\nA. Ann\nB. Bob\nC. Cid\nD. Dan\n\nThe the correct answer is"
    assert grade(turn, "Dan") == grade(turn, "D") == 1
    assert grade(turn, "C") == 0
    assert second.question.endswith("D. Dan\n\nThe letter of the correct answer is")
    (example,) = scbench(tmp_path / "scbench_choice_eng.jsonl", row, published=True)
    assert prompt(example, 1).count("answer isDan\n\nQuestion: Who?") == 1, "later turns see the text"
    assert grade(example.turns[0], "D. Dan") == 1


def test_scbench_math_find_has_numbers_for_context_and_answer(tmp_path):
    turns = [
        {"input": "You should answer with only one number. The largest number is", "answer": 9},
        {"input": "The 2nd largest number is", "answer": 8},
    ]
    (example,) = scbench(tmp_path / "scbench_mf.jsonl", {"id": 1, "context": [7, 9, 8], "multi_turns": turns})
    assert example.context == "[7, 9, 8]"
    assert example.opening == "What is the largest number?\n\n[7, 9, 8]"
    assert example.turns[0].question == "You should answer with only one number. The largest number is"
    assert example.turns[1].question == "What is the 2nd largest number?\n\nThe 2nd largest number is"
    assert grade(example.turns[1], "The 2nd largest number is 8") == 1
    wrong = {"id": 1, "context": [7], "multi_turns": [{"input": "Largest?", "answer": 7}]}
    with pytest.raises(ValueError, match="no question of math find"):
        scbench(tmp_path / "scbench_mf.jsonl", wrong)


def test_scbench_variable_tracking_has_lists_of_answers(tmp_path):
    row = {"id": 0, "context": "VAR AB = 1", "multi_turns": [{"input": "All?", "answer": ["AB", "CD", "EF"]}]}
    (example,) = scbench(tmp_path / "scbench_vt.jsonl", row)
    (turn,) = example.turns
    assert turn.answers == ("['AB', 'CD', 'EF']", "AB", "CD", "EF"), "the first as later turns see it"
    assert grade(turn, "AB and CD") == pytest.approx(2 / 3)
    (example,) = scbench(tmp_path / "scbench_vt.jsonl", row, published=True)
    assert grade(example.turns[0], "AB and CD") == 0.67


def test_scbench_functions_of_a_repository_are_each_others_choices(tmp_path):
    def row(number, repo, **named):
        turns = [{"input": "Which?", "answer": answer, "name": name} for name, answer in named.items()]
        return {"id": number, "repo": repo, "lang": "python", "context": "code", "multi_turns": turns}

    code = {name: f"def {name}():\n    pass" for name in "abcd"}
    rows = [
        row(0, "one", a=code["a"], b=code["b"]),
        row(1, "two", c=code["c"]),
        row(2, "one", a=code["d"]),
    ]
    path = tmp_path / "scbench_repoqa.jsonl"
    first, second, third = scbench(path, *rows)
    assert first.turns[0].choices == third.turns[0].choices == (code["a"], code["b"], code["d"])
    assert second.turns[0].choices == (code["c"],)
    assert grade(first.turns[0], f"```python\n{code['a']}\n```") == 1
    assert {turn.answers for turn in first.turns} == {(code["a"],), (code["b"],)}
    first, second, third = scbench(path, *rows, published=True)
    assert first.turns[0].scorer == "scbench:repoqa"
    assert first.turns[0].answers == (code["a"], code["d"]), "functions of one name stand for each other"
    assert first.turns[1].answers == (code["b"],)
    assert third.turns[0].answers == (code["d"], code["a"])
    (rust,) = scbench(path, {**rows[1], "lang": "rust"}, published=True)
    assert rust.turns[0].scorer == "scbench:repoqa:rust"


def test_scbench_functions_are_refused_where_they_cannot_be_scored(tmp_path, monkeypatch):
    path = tmp_path / "scbench_repoqa.jsonl"
    turn = {"input": "Which?", "answer": "def a(): pass", "name": "a"}
    row = {"id": 0, "repo": "one", "context": "code", "multi_turns": [turn]}
    with pytest.raises(ValueError, match="row 0 has no 'lang'"):
        scbench(path, row, published=True)
    row["lang"] = "cobol"
    with pytest.raises(ValueError, match="no language 'cobol'"):
        scbench(path, row, published=True)
    row["lang"] = "python"
    turn.pop("name")
    with pytest.raises(ValueError, match="turn 0 has no 'name'"):
        scbench(path, row, published=True)
    repoqa_scorer._finder.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    turn["name"] = "a"
    with pytest.raises(ValueError, match="pip install 'winnow-llm"):
        scbench(path, row, published=True)
    assert scbench(path, row)[0].turns[0].scorer == "code", "the corrected scorer needs no parser"


def test_scbench_turns_of_mixtures_name_their_task(tmp_path):
    row = {
        "id": 0,
        "repo": "one",
        "context": "code",
        "multi_turns": [
            {"task": "scbench_repoqa", "input": "Which?", "answer": "def a(): pass", "name": "a"},
            {"task": "scbench_kv", "input": "Key?", "answer": "12"},
        ],
    }
    (example,) = scbench(tmp_path / "scbench_repoqa_and_kv.jsonl", row)
    assert [turn.scorer for turn in example.turns] == ["code", "string"]
    assert [turn.max_new_tokens for turn in example.turns] == [1024, 80]
    assert example.turns[0].choices == ("def a(): pass",)
    row["multi_turns"] = [
        {"task": "scbench_summary", "input": "Sum up.", "answer": "It ends."},
        {"task": "scbench_passkey", "input": "Key?", "answer": "71432"},
    ]
    (example,) = scbench(tmp_path / "scbench_summary_with_needles.jsonl", row)
    assert [turn.scorer for turn in example.turns] == ["scbench:summary", "number"]
    assert [turn.max_new_tokens for turn in example.turns] == [800, 15]
    assert example.opening == "code"


def test_scbench_passkeys_have_an_instruction_and_full_stops(tmp_path):
    turns = [{"input": "Key?", "answer": "71432"}] * 2
    row = {"id": 0, "context": "noise", "multi_turns": turns}
    (example,) = scbench(tmp_path / "scbench_passkey.jsonl", row)
    assert prompt(example, 1).endswith("important information.\n\nnoise\n\nKey?71432.\n\nKey?")


@pytest.mark.parametrize("name", published.SCBENCH)
def test_every_scbench_task_is_read_and_its_golden_answer_scores(name, tmp_path):
    question = "The largest number is" if name == "mf" else "Which?"
    turn = {"input": question, "answer": "71432", "options": ["1", "2", "3", "71432"], "name": "f"}
    row = {"id": 0, "context": "text", "multi_turns": [turn], "lang": "python", "repo": "one"}
    path = tmp_path / f"scbench_{name}.jsonl"
    for mode in (False, True):
        (example,) = scbench(path, row, published=mode)
        (made,) = example.turns
        assert "text" in prompt(example, 0)
        if made.scorer not in ("code", "scbench:repoqa", "scbench:qa_chn"):
            assert grade(made, made.answers[0]) == 1


def test_scbench_refusals(tmp_path):
    with pytest.raises(ValueError, match="no task 'tale'; name one of kv"):
        scbench(tmp_path / "tale.jsonl", {"context": "", "multi_turns": []})
    with pytest.raises(ValueError, match="row 0 has no 'multi_turns'; its fields are context"):
        scbench(tmp_path / "scbench_kv.jsonl", {"context": ""})
    with pytest.raises(ValueError, match="there is no file"):
        list(published.scbench(tmp_path / "missing.jsonl", count=count, task="kv"))


def test_ruler(tmp_path):
    row = {
        "index": 0,
        "input": "Some special magic numbers are hidden.\nOne is: 71.\nWhat are they for dog?",
        "outputs": ["71", "5"],
        "length": 100,
        "answer_prefix": " They are",
        "token_position_answer": 40,
    }
    folder = tmp_path / "niah_multivalue"
    folder.mkdir()
    (example,) = published.ruler(jsonl(folder / "validation.jsonl", row), count=count)
    assert (example.task, example.category) == ("ruler:niah_multivalue", "string")
    assert prompt(example, 0) == row["input"] + " They are"
    assert example.context == "Some special magic numbers are hidden.\nOne is: 71."
    assert example.turns[0].depth == 0.4
    assert grade(example.turns[0], "71 and 6") == 0.5
    assert grade(example.turns[0], "71, 5") == 1
    # older data: the prefix is part of the input, the position unknown
    old = {"index": 0, "input": "Read.\nWho?", "outputs": ["Ann", "Anna"], "length": 9}
    (example,) = published.ruler(jsonl(tmp_path / "qa_1.jsonl", old), count=count)
    assert example.category == "semantic"
    assert grade(example.turns[0], "it was anna") == 1
    with pytest.raises(ValueError, match="RULER has no task"):
        list(published.ruler(jsonl(tmp_path / "other.jsonl", old), count=count))


def test_longbench(tmp_path):
    row = {
        "input": "Who built it?",
        "context": "Bob built {it}.",
        "answers": ["Bob", "Robert"],
        "length": 3,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "f0",
    }
    path = jsonl(tmp_path / "hotpotqa.jsonl", row)
    (plain,) = published.longbench(path, count=count)
    assert prompt(plain, 0) == "Bob built {it}.\n\nWho built it?"
    prompts = tmp_path / "dataset2prompt.json"
    prompts.write_text(
        json.dumps({"hotpotqa": "Answer.\n{context}\nQuestion: {input}\nAnswer:"}), encoding="utf-8"
    )
    (example,) = published.longbench(path, count=count, prompts=prompts)
    assert example.opening == "Answer.\nBob built {it}."
    assert prompt(example, 0) == "Answer.\nBob built {it}.\nQuestion: Who built it?\nAnswer:"
    assert grade(example.turns[0], "the Robert") == 1
    assert example.turns[0].max_new_tokens == 32

    classed = replace_row(row, dataset="trec_e", answers=["Food"], all_classes=["Food", "Animal"])
    (example,) = published.longbench(jsonl(tmp_path / "trec_e.jsonl", classed), count=count)
    assert example.task == "longbench:trec"
    assert example.turns[0].choices == ("Food", "Animal")
    assert grade(example.turns[0], "Food\nAnimal") == 1
    line = replace_row(row, dataset="triviaqa")
    (example,) = published.longbench(jsonl(tmp_path / "triviaqa.jsonl", line), count=count)
    assert grade(example.turns[0], "Bob\nQuestion: who else?") == 1, (
        "the rest is the next example of the prompt"
    )
    with pytest.raises(ValueError, match="LongBench has no task 'tale'"):
        list(published.longbench(jsonl(tmp_path / "x.jsonl", replace_row(row, dataset="tale")), count=count))


def replace_row(row, **changes):
    return {**row, **changes}


def test_longbench_of_the_second_version(tmp_path):
    row = {"_id": "1", "domain": "QA", "question": "Who?", "context": "Long.", "answer": "C"}
    row |= {f"choice_{letter}": f"name {letter}" for letter in "ABCD"}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row, row]), encoding="utf-8")
    one, two = published.longbench(path, count=count)
    assert (one.number, two.number) == (0, 1)
    assert one.turns[0].answers == ("C", "name C")
    assert grade(one.turns[0], "The answer is C") == 1
    assert replace(two, number=0).checksum == one.checksum


def test_a_torn_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "scbench_kv.jsonl"
    path.write_text('{"context": "a", "multi_turns": []}\n{"context": "b', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        list(published.scbench(path, count=count))
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is no JSON object"):
        list(published.scbench(path, count=count))
    other = tmp_path / "rows.json"
    other.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"JSON Lines files end in \.jsonl"):
        list(published.longbench(other, count=count))


def test_a_hub_is_asked_only_by_name_and_needs_its_package(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install datasets"):
        list(published.scbench("hub:microsoft/SCBench/scbench_kv", count=count))


def test_a_hubs_rows_are_read(monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(name, config, split):
            asked.append((name, config, split))
            return [{"context": "a", "multi_turns": [{"input": "b", "answer": "c"}]}]

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    (example,) = published.scbench("hub:microsoft/SCBench/scbench_kv", count=count)
    assert asked == [("microsoft/SCBench", "scbench_kv", "test")]
    assert example.task == "scbench:kv"
