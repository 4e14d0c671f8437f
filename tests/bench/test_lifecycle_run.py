"""The run end to end: modes, measures, resumption after a kill, peers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from winnow import api
from winnow.bench.lifecycle import live, modes, peers
from winnow.bench.lifecycle.config import BASELINE, Unit, default, kind, recipe, units
from winnow.bench.lifecycle.journal import NAME
from winnow.bench.lifecycle.record import CONTEXT, ExampleRecord, Reply
from winnow.bench.lifecycle.report import page
from winnow.bench.lifecycle.run import load, run
from winnow.bench.lifecycle.system import WinnowSystem
from winnow.bench.tasks import TASKS

SMALL = {"tasks": ["kv", "many-shot"], "lengths": [512], "examples": 1, "turns": 2}


@pytest.fixture(scope="module")
def llm():
    return api.load("embedded")


@pytest.fixture(scope="module")
def small(llm, tmp_path_factory):
    """A small run of a recipe that drops and one that reads sparsely, and its directory."""
    directory = tmp_path_factory.mktemp("small")
    config = default(**SMALL, recipes=["snapkv:keep=96", "sparse-read", "four-stages"])
    return run(config, directory, llm=llm), directory


def measured(summary):
    """What of a run does not depend on the clock."""
    timed = ("time_to_first_token", "decode_seconds", "resident_bytes", "peak_bytes")
    columns = summary["samples"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in summary["samples"]["rows"]]
    return sorted(
        json.dumps({name: value for name, value in row.items() if name not in timed}) for row in rows
    ), [{name: row[name] for name in ("system", "mode", "scores", "nominal")} for row in summary["rows"]]


# ---------------------------------------------------------------------- modes


class Oracle:
    """A system that answers by the task's rule, and remembers what it was shown."""

    name = "oracle"
    replayed = 0

    def __init__(self, example, wrong=()):
        self.example, self.wrong = example, wrong
        self.text, self.asked, self.shown, self.branches = "", 0, [], 0

    @contextmanager
    def open(self, *, requests):
        self.requests = requests
        yield self

    def read(self, text):
        self.text += text
        return self._reply("")

    def ask(self, text, *, max_new_tokens, stop):
        turn = self.example.turns[self.asked]
        answer = "wrong" if self.asked in self.wrong else TASKS[self.example.task].solve(self.example, turn)
        self.asked += 1
        self.text += text
        self.shown.append(self.text)
        assert max_new_tokens == turn.max_new_tokens
        assert stop
        assert not any(word in answer for word in stop), "an answer must not end itself"
        return self._reply(answer)

    def take_back(self):
        pass

    @contextmanager
    def branch(self):
        before = self.text
        self.branches += 1
        yield self
        self.text = before

    def head_bytes(self):
        return None

    entries = head_bytes

    def resident(self):
        return None

    peak = resident

    @staticmethod
    def _reply(text):
        return Reply(
            text=text,
            finish_reason="stop",
            tokens_computed=1,
            tokens_reused=0,
            tokens_generated=1,
            time_to_first_token=1.0,
            decode_seconds=0.0,
            bytes_stored={},
        )


def words(text):
    return len(text.split())


@pytest.mark.parametrize("mode", modes.MODES)
@pytest.mark.parametrize(
    ("task", "form"), [(task.name, form) for task in TASKS.values() for form in task.forms]
)
def test_an_oracle_is_right_in_every_mode_task_and_form(task, form, mode, llm):
    count = words if form == "text" else lambda text: len(llm.tokens(text))
    example = TASKS[task].make(form=form, length=2048, seed=3, turns=3, count=count)
    oracle = Oracle(example)
    record = modes.hold(oracle, mode, example)
    assert [turn.score for turn in record.questions] == [1.0] * 3
    assert oracle.requests == (mode == modes.REQUESTS)
    assert ExampleRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    ("mode", "earlier"), [("multi-turn", "golden"), ("multi-turn-own", "own"), ("multi-request", None)]
)
def test_what_later_turns_are_shown(mode, earlier, llm):
    example = Unit(task="kv", length=512, number=0, mode=mode).example(
        default(**{**SMALL, "turns": 3}), lambda text: len(llm.tokens(text))
    )
    oracle = Oracle(example, wrong=(0,))
    record = modes.hold(oracle, mode, example)
    assert [turn.score for turn in record.questions] == [0.0, 1.0, 1.0]
    join, first = example.join, example.turns[0]
    for number, shown in enumerate(oracle.shown):
        assert shown.startswith(example.opening)
        assert shown.endswith(join.ask(example.turns[number].question))
        assert shown.count(join.ask(first.question)) == (number == 0 or mode != "multi-request")
    golden = join.ask(first.question) + join.reply(first.answers[0])
    own = join.ask(first.question) + join.reply("wrong")
    assert (golden in oracle.shown[2]) == (earlier == "golden")
    assert (own in oracle.shown[2]) == (earlier == "own")
    assert oracle.branches == (3 if mode == "multi-request" else 0)
    assert [turn.turn for turn in record.turns] == ([CONTEXT] if earlier is None else []) + [1, 2, 3]


def test_answers_end_where_the_next_text_begins():
    example = TASKS["qa-en"].make(form="text", length=2048, seed=1, turns=1, count=words)
    assert modes.stop(example.join)
    for text in modes.stop(example.join):
        assert text in example.join.answer + example.join.question


# ---------------------------------------------------------------------- Winnow's own systems


def test_every_mode_equals_one_long_prompt(llm):
    """Full attention has no state to go wrong: sessions, rewinding and forks change no answer."""
    example = Unit(task="kv", length=512, number=0, mode="multi-turn").example(
        default(**{**SMALL, "turns": 3}), lambda text: len(llm.tokens(text))
    )
    system = WinnowSystem(BASELINE, llm, recipe(BASELINE))
    for mode in ("multi-turn", "multi-request"):
        record = modes.hold(system, mode, example)
        history = ""
        for number, turn in enumerate(record.questions):
            question = example.join.ask(example.turns[number].question)
            text = example.opening + (history if mode == "multi-turn" else "") + question
            alone = llm.generate(text, max_new_tokens=24, stop=modes.stop(example.join))
            assert turn.reply.text == alone.text
            # Tokens are never computed twice, and none is left out.
            assert turn.reply.tokens_computed + turn.reply.tokens_reused == len(llm.tokens(text))
            history += question + example.join.reply(example.turns[number].answers[0])


def test_what_was_compressed_while_decoding_is_replayed(llm):
    dropping = "streaming-llm:sinks=4,recent=64,every=1"
    system = WinnowSystem(dropping, llm, recipe(dropping))
    example = Unit(task="kv", length=512, number=0, mode="multi-turn").example(
        default(**{**SMALL, "turns": 3}), lambda text: len(llm.tokens(text))
    )
    record = modes.hold(system, "multi-turn", example)
    opening = len(llm.tokens(example.opening))
    assert record.replayed_tokens > opening
    for number, turn in enumerate(record.questions):
        asked = opening + sum(
            len(llm.tokens(example.join.ask(t.question), special=False)) for t in example.turns[: number + 1]
        )
        shown = sum(
            len(llm.tokens(example.join.reply(t.answers[0]), special=False)) for t in example.turns[:number]
        )
        assert turn.reply.tokens_computed + turn.reply.tokens_reused == asked + shown


def test_conversations_do_not_see_each_other(llm):
    config = default(**SMALL)
    system = WinnowSystem("four-stages", llm, recipe("four-stages"))
    unit = Unit(task="kv", length=512, number=0, mode="multi-request")
    example = unit.example(config, lambda text: len(llm.tokens(text)))
    first, second = (modes.hold(system, unit.mode, example) for _ in range(2))
    for a, b in zip(first.turns, second.turns, strict=True):
        assert a.reply.tokens_reused == b.reply.tokens_reused
        assert a.reply.bytes_stored == b.reply.bytes_stored
        assert a.reply.text == b.reply.text
    assert second.turns[0].reply.tokens_reused == 0, "the pool of an earlier conversation was seen"
    assert second.turns[1].reply.tokens_reused > 0, "the pool of this conversation was not used"


# ---------------------------------------------------------------------- the run


def test_the_baseline_runs_beside_and_costs_are_measured(small):
    summary, _ = small
    assert [system["name"] for system in summary["systems"]] == [
        *("full", "snapkv:keep=96", "sparse-read", "four-stages")
    ]
    rows = {(row["system"], row["mode"]): row for row in summary["rows"]}
    assert len(rows) == 8
    for mode in summary["config"]["modes"]:
        full, drops, sparse, pooled = (rows[s["name"], mode] for s in summary["systems"])
        assert set(full["beside_baseline"].values()) == {1.0}
        assert full["scores"]["all"]["examples"] == 2
        assert full["scores"]["all"]["turns"] == 4
        assert drops["beside_baseline"]["bytes_stored"] < 0.5
        assert drops["nominal"]["stored"] == pytest.approx(96 / 516, abs=0.05)
        assert sparse["beside_baseline"]["bytes_stored"] > 1.0, "the sketch counts as stored"
        assert sparse["nominal"]["read"] < sparse["beside_baseline"]["bytes_read_per_token"] < 0.9
        assert pooled["cost"]["bytes_stored_by"]["host/pool"] > 0
        for row in (full, drops, sparse, pooled):
            assert row["cost"]["peak_bytes"] > 0
            assert row["cost"]["first_token_seconds"] > 0


def test_where_the_bytes_are(small):
    summary, _ = small
    heads = {(one["system"], one["mode"]): one for one in summary["heads"]}
    full = heads["full", "multi-turn"]
    assert (len(full["bytes"]), len(full["bytes"][0])) == (6, 4)
    row = next(r for r in summary["rows"] if (r["system"], r["mode"]) == ("full", "multi-turn"))
    total = sum(map(sum, full["bytes"]))
    # What is stored is held in whole memory pages.
    assert total <= row["cost"]["bytes_stored"] <= total + 2 * 24 * 4096
    assert sum(map(sum, heads["snapkv:keep=96", "multi-turn"]["bytes"])) < 0.5 * total
    assert ("four-stages", "multi-request") not in heads


def test_a_finished_run_is_not_repeated_and_not_overwritten(small, llm):
    summary, directory = small
    config = default(**SMALL, recipes=["snapkv:keep=96", "sparse-read", "four-stages"])
    with pytest.raises(ValueError, match="--resume"):
        run(config, directory, llm=llm)
    seen = []
    again = run(config, directory, llm=llm, resume=True, watch=lambda state: seen.append(state.now))
    assert seen == []
    assert measured(again) == measured(summary)
    assert again["seconds"] > summary["seconds"] > 0, "every sitting counts"
    with pytest.raises(ValueError, match="something else"):
        run(default(**SMALL, recipes=["sparse-read"]), directory, llm=llm, resume=True)


@pytest.mark.slow
def test_dropping_for_the_first_question_fails_on_later_ones(llm, tmp_path):
    """SCBench's finding, on the model that ships: the same share of entries kept, or read of all."""
    recipes = ["snapkv:keep=64", "streaming-llm:sinks=4,recent=60", "sparse-read"]
    config = default(tasks=["kv", "many-shot"], lengths=[1024], examples=2, turns=4, recipes=recipes)
    summary = run(config, tmp_path, llm=llm)
    right = {
        (row["system"], row["mode"]): [row["scores"]["part"][part]["mean"] for part in ("first", "later")]
        for row in summary["rows"]
    }
    full, snapkv, streaming, sparse = (right[name, "multi-turn"] for name in ("full", *recipes))
    assert full == sparse == [1.0, 1.0]
    assert snapkv[0] >= 0.75, "the first question is known when entries are dropped"
    assert snapkv[1] <= 0.5, "the later ones are not"
    assert streaming[0] <= 0.5, "a static rule does not know the first question either"
    for name in ("full", "sparse-read"):
        assert right[name, "multi-request"] == [1.0, 1.0]
    assert max(right["snapkv:keep=64", "multi-request"]) <= 0.5, "no question is known"


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(small, tmp_path):
    """A real kill -9 while it works, and the torn line that a power cut would leave."""
    arguments = ["--tasks", "kv,many-shot", "--lengths", "512", "--examples", "1", "--turns", "2"]
    arguments += ["--recipes", "snapkv:keep=96,sparse-read,four-stages", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", "from winnow.cli import main; main()", "bench", "lifecycle", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    journal, begun = tmp_path / "run" / NAME, time.monotonic()
    while not journal.exists() or journal.read_bytes().count(b'"kind":"example"') < 3:
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() - begun < 300
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = journal.read_bytes().count(b'"kind":"example"')
    with journal.open("ab") as file:
        file.write(b'{"kind":"example","system":"full","mo')
    assert 3 <= done < 16, "it was killed while it worked"
    finished = subprocess.run(
        [*command, "--resume", "--json"], env=environment, capture_output=True, text=True, check=True
    )
    assert measured(json.loads(finished.stdout)) == measured(small[0])
    keys = [
        (e["system"], e["mode"], e["task"], e["length"], e["number"])
        for e in map(json.loads, journal.read_text(encoding="utf-8").splitlines())
        if e["kind"] == "example"
    ]
    assert len(keys) == len(set(keys)) == 16
    summary = json.loads((tmp_path / "run" / "lifecycle.json").read_text(encoding="utf-8"))
    assert len(summary["sessions"]) == 2
    assert (tmp_path / "run" / "lifecycle.html").stat().st_size > 20_000


def test_a_recipe_that_fails_is_reported_and_tried_again(llm, tmp_path, monkeypatch):
    config = default(**{**SMALL, "tasks": ["kv"]}, recipes=["sparse-read"])

    def refuse(self, *, requests):
        raise ValueError("not today")

    real = WinnowSystem.open
    monkeypatch.setattr(
        WinnowSystem, "open", lambda self, **k: (refuse if self.name == "sparse-read" else real)(self, **k)
    )
    summary = run(config, tmp_path, llm=llm)
    assert [f["error"] for f in summary["failures"]] == ["not today"] * 2
    assert {row["system"] for row in summary["rows"]} == {"full"}
    assert "Refused examples: 2, the first by sparse-read: not today" in live.notes(summary)
    monkeypatch.setattr(WinnowSystem, "open", real)
    again = run(config, tmp_path, llm=llm, resume=True)
    assert again["failures"] == []
    assert {row["system"] for row in again["rows"]} == {"full", "sparse-read"}


def test_lengths_that_the_model_cannot_take_are_refused_at_once(llm, tmp_path):
    with pytest.raises(ValueError, match="choose shorter contexts"):
        run(default(**{**SMALL, "lengths": [20_000]}), tmp_path, llm=llm)
    assert not list(tmp_path.iterdir())


def test_configurations_are_checked():
    for changes, message in (
        ({"tasks": ["kw"]}, "did you mean 'kv'"),
        ({"modes": ["multi"]}, "unknown mode"),
        ({"tasks": ["qa-en"]}, "no embedded form"),
        ({"lengths": [512, 512]}, "twice"),
        ({"examples": 0}, "at least 1"),
        ({"tasks": []}, "at least one"),
        ({"data": ["kv.jsonl"]}, "scbench:FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            default(**changes)
    assert default("./llama").form == "text"
    assert set(default("./llama").tasks) == set(TASKS)
    one, other = default(examples=2), default(examples=3)
    assert one.fingerprint == default(examples=2).fingerprint != other.fingerprint
    assert len(units(one, words)) == len(one.tasks) * len(one.lengths) * len(one.modes) * 2
    assert recipe("snapkv:keep=96,window=16").compression is not None
    with pytest.raises(ValueError, match="cannot read"):
        recipe("snapkv:96")
    assert kind("sparse-read", recipe("sparse-read")) == "sparse reading"
    assert kind("full", recipe("full")) == "baseline"
    for source in default().recipes:
        assert recipe(source).to_yaml()


def test_published_data_runs_beside_the_tasks(llm, tmp_path):
    """Data in SCBench's schema; the embedded model reads it letter by letter and is wrong, at full cost."""
    turns = [{"input": "Which value has the key a?", "answer": "x1"}, {"input": "And b?", "answer": "y2"}]
    file = tmp_path / "scbench_kv.jsonl"
    lines = [{"id": i, "context": f"{{{i}: 'a'}} " * 40, "multi_turns": turns} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = default(tasks=["kv"], data=[f"scbench:{file}"], lengths=[512], examples=2, recipes=[], turns=2)
    summary = run(config, tmp_path / "run", llm=llm)
    scores = summary["rows"][0]["scores"]
    (name,) = set(scores["task"]) - {"kv"}
    assert scores["task"][name]["examples"] == 2, "no more examples than asked for"
    lengths = {row[4] for row in summary["samples"]["rows"] if row[2] == name}
    assert all(length & (length - 1) == 0 for length in lengths), "rounded up to powers of two"
    assert "kv" in page(summary)
    assert default(data=[f"scbench:{file}"]).tasks == ()


# ---------------------------------------------------------------------- peers


def stand_in(directory):
    """An interpreter that knows the protocol and answers nothing right, in place of an installed kvpress."""
    program = directory / "python"
    program.write_text(
        f"""#!{sys.executable}
import json, sys
json.loads(sys.stdin.readline())
print(json.dumps({{"versions": {{}}, "nominal": 0.5, "note": "a stand-in"}}), flush=True)
for line in sys.stdin:
    op = json.loads(line)["op"]
    reply = dict(text="?", finish_reason="stop", tokens_computed=1, tokens_reused=0, tokens_generated=2,
                 time_to_first_token=0.1, decode_seconds=0.1, bytes_stored={{"host/bfloat16": 10}})
    print(json.dumps({{"ok": reply if op in ("ask", "read") else None}}), flush=True)
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.slow
def test_kvpress_holds_the_same_conversations_in_fewer_bytes(llm, tmp_path, kvpress_python):
    pythons = {"kvpress": kvpress_python}
    names = ["kvpress:KnormPress@0.0", "kvpress:SnapKVPress@0.5", "kvpress:NoSuchPress@0.5"]
    config = default(
        **{**SMALL, "tasks": ["kv"], "examples": 2},
        recipes=[],
        peers=names,
        modes=["multi-turn", "multi-request"],
    )
    summary = run(config, tmp_path / "run", llm=llm, pythons=pythons)
    missing = {system["name"]: system["missing"] for system in summary["systems"]}
    assert "has no NoSuchPress" in missing.pop("kvpress:NoSuchPress@0.5")
    assert set(missing.values()) == {None}, "the others took part"
    rows = {(row["system"], row["mode"]): row for row in summary["rows"]}
    columns = summary["samples"]["columns"]
    samples = [dict(zip(columns, row, strict=True)) for row in summary["samples"]["rows"]]

    def of(system, mode, name):
        questions = [one for one in samples if (one["system"], one["mode"]) == (system, mode) and one["turn"]]
        return [one[name] for one in questions]

    for mode in config.modes:
        assert rows["full", mode]["scores"]["all"]["mean"] == 1
        # A press that drops nothing is the model itself: the same answers from the same bytes.
        assert of("kvpress:KnormPress@0.0", mode, "answer") == of("full", mode, "answer")
        whole = of("kvpress:KnormPress@0.0", mode, "bytes_stored")
        half = of("kvpress:SnapKVPress@0.5", mode, "bytes_stored")
        assert whole
        assert all(0.4 < some / every < 0.65 for every, some in zip(whole, half, strict=True))


def test_a_missing_peer_is_reported_as_missing(llm, tmp_path):
    config = default(
        **{**SMALL, "tasks": ["kv"], "modes": ["multi-turn"]}, recipes=[], peers=["kvpress:SnapKVPress@0.5"]
    )
    nowhere = {"kvpress": str(tmp_path / "no-python")}
    summary = run(config, tmp_path / "run", llm=llm, pythons=nowhere)
    missing = {system["name"]: system["missing"] for system in summary["systems"]}
    assert missing["full"] is None
    assert "does not start" in missing["kvpress:SnapKVPress@0.5"]
    assert any("is missing" in note for note in live.notes(summary))
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in live.table(summary):
        console.print(table)
    assert "missing" in console.export_text()
    here = {"kvpress": stand_in(tmp_path)}
    again = run(config, tmp_path / "run", llm=llm, pythons=here, resume=True)
    assert [system["missing"] for system in again["systems"]] == [None, None], "it came in the resumed run"
    assert {row["system"] for row in again["rows"]} == {"full", "kvpress:SnapKVPress@0.5"}
    with pytest.raises(ValueError, match="cannot read the peer"):
        run(default(**SMALL, peers=["vllm"]), tmp_path / "other", llm=llm)


@pytest.mark.slow
def test_transformers_as_a_peer_gives_the_same_answers(llm, tmp_path):
    """Its own process and cache, the same examples: full attention agrees, token for token."""
    config = default(**{**SMALL, "tasks": ["kv"]}, recipes=[], peers=["hf:dynamic"])
    summary = run(config, tmp_path, llm=llm)
    assert [system["missing"] for system in summary["systems"]] == [None, None]
    columns = summary["samples"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in summary["samples"]["rows"]]
    ours, theirs = ([r for r in rows if r["system"] == name] for name in ("full", "hf:dynamic"))
    assert len(ours) == len(theirs) == 5
    for mine, peer in zip(ours, theirs, strict=True):
        for name in ("checksum", "score", "tokens_computed", "tokens_reused", "tokens_generated"):
            assert mine[name] == peer[name]
        # Winnow's text ends before the stop string; the peer's may hold it where it is all there is.
        assert mine["answer"].strip() == peer["answer"].strip()
        # 6 layers, 4 heads, keys and values of 64 bf16 channels; the last token has no entry
        tokens = peer["tokens_computed"] + peer["tokens_reused"] + peer["tokens_generated"] - 1
        assert peer["bytes_stored"] == tokens * 6 * 4 * 2 * 64 * 2
        assert peer["bytes_stored"] <= mine["bytes_stored"] <= peer["bytes_stored"] + 4 * 24 * 4096
        assert peer["bytes_read"] is None
        assert peer["score_entries"] is None


@pytest.mark.skipif(bool(peers.available()), reason="llama.cpp is not installed")
def test_llama_cpp_as_a_peer_gives_the_same_answers(llm, tmp_path):
    config = default(**{**SMALL, "tasks": ["kv"]}, recipes=[], peers=["llama.cpp"])
    summary = run(config, tmp_path, llm=llm)
    assert [system["missing"] for system in summary["systems"]] == [None, None]
    columns = summary["samples"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in summary["samples"]["rows"]]
    ours, theirs = ([r for r in rows if r["system"] == name] for name in ("full", "llama.cpp"))
    for mine, peer in zip(ours, theirs, strict=True):
        for name in ("checksum", "score", "tokens_computed", "tokens_reused"):
            assert mine[name] == peer[name]
        assert mine["answer"].strip() == peer["answer"].strip()
        assert 0 < peer["bytes_stored"] < 1.05 * mine["bytes_stored"]


def test_a_journal_alone_gives_the_summary(small):
    summary, directory = small
    sittings = {"machine", "sessions", "seconds"}  # another test went on with this run
    assert {k: v for k, v in load(directory).items() if k not in sittings} == {
        k: v for k, v in summary.items() if k not in sittings
    }
    with pytest.raises(ValueError, match="there is no run"):
        load(Path("no-such-directory"))
