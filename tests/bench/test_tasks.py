"""The benchmark's tasks: the same bytes everywhere, solvable by reading, as long as asked for."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.bench.scorers import SCORERS
from winnow.bench.tasks import TASKS, Example, Join, Turn, prompt
from winnow.bench.tasks.text.chinese import CHINESE
from winnow.bench.tasks.text.chronicle import answer, query, tell
from winnow.bench.tasks.text.english import ENGLISH
from winnow.bench.tasks.text.fit import spread
from winnow.bench.tasks.text.source_code import functions, haystack, parse
from winnow.models.embedded import documents
from winnow.models.embedded.dice import Dice
from winnow.models.embedded.language import tokenizer


def quarters(text):
    """A stand-in for a tokenizer: four bytes a token."""
    return len(text.encode()) // 4


def words(text):
    """Another: words, digits one by one, and every other character."""
    return len(re.findall(r"[A-Za-z]+|\S", text))


GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "tasks.md"


def table():
    """The guide's table of tasks."""

    def knobs(name):
        listed = [
            ", ".join(f"`{k}={v}`" for k, v in TASKS[name].knobs(form).items())
            for form in ("text", "embedded")
        ]
        return " \\| ".join(part or "-" for part in listed[: len(TASKS[name].forms)])

    rows = [
        f"| {name} | {task.category} | {task.about} | {', '.join(task.forms)} | {knobs(name)} |"
        for name, task in TASKS.items()
    ]
    return "\n".join(
        ["| task | category | what it asks | forms | knobs |", "|---|---|---|---|---|", *rows, ""]
    )


def test_guide_lists_every_task_as_it_is():
    text = GUIDE.read_text(encoding="utf-8")
    assert table() in text
    for name, task in TASKS.items():
        section = next(part for part in text.split("\n### ")[1:] if name in part.split(":")[0])
        assert all(f"`{knob}" in section for knob in task.text_knobs), name


def test_guide_runs_and_names_every_scorer(capsys):
    text = GUIDE.read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(first[1], str(GUIDE), "exec"), {})
    assert 'Key: "' in capsys.readouterr().out
    used = {turn.scorer for name, form in FORMS for turn in make(name, form).turns}
    assert all(f"| `{scorer}` |" in text for scorer in used)


FORMS = [(name, form) for name, task in TASKS.items() for form in task.forms]
#: of examples with length 1024, seed 7, number 1 and four bytes a token
PINNED: dict[tuple[str, str], str] = {
    ("kv", "text"): "7ede71d8b969398a",
    ("kv", "embedded"): "929f4b3f59bb598f",
    ("prefix-suffix", "text"): "a6a22dd68c746f8b",
    ("prefix-suffix", "embedded"): "1f80a26141318c4a",
    ("vt", "text"): "9dcb717695e3ecba",
    ("vt", "embedded"): "6f8aa15a3d9193fb",
    ("joint-recall", "text"): "9b2a5736b4c51dc8",
    ("joint-recall", "embedded"): "164d098976c51116",
    ("repoqa", "text"): "d6696e6468e5fe8a",
    ("qa-en", "text"): "f35232f3bb0bd5de",
    ("choice-en", "text"): "4229073780f39893",
    ("qa-zh", "text"): "3647c4970beb5e7f",
    ("mf", "text"): "5f3d19a7c2556dc7",
    ("mf", "embedded"): "cf04d40ac86ed735",
    ("many-shot", "text"): "6f75f9f6a4bcf4f6",
    ("many-shot", "embedded"): "06ca735cabd7accc",
    ("summary", "text"): "40d339b7601813e7",
    ("summary-needles", "text"): "63d2aa25d1e58d0e",
    ("summary-needles", "embedded"): "e4c42743a6fb4b35",
    ("repoqa-kv", "text"): "58f362f458c1cf91",
    ("repoqa-kv", "embedded"): "ca589a541bd43edd",
}


def make(name, form="text", length=1024, **more):
    return TASKS[name].make(form=form, length=length, seed=more.pop("seed", 7), count=quarters, **more)


def test_thirteen_tasks_and_scbench_names():
    assert list(TASKS) == [task.name for task in TASKS.values()]
    assert set(TASKS) == {
        *("kv", "prefix-suffix", "vt", "joint-recall", "repoqa", "qa-en", "choice-en", "qa-zh"),
        *("mf", "many-shot", "summary", "summary-needles", "repoqa-kv"),
    }
    assert all("text" in task.forms for task in TASKS.values())
    embedded = {name for name, task in TASKS.items() if "embedded" in task.forms}
    assert {"kv", "prefix-suffix", "vt", "joint-recall", "mf", "many-shot", "summary-needles"} <= embedded


@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.parametrize("length", [700, 1024, 4096])
def test_oracle_answers_every_turn_from_the_context(name, form, length):
    task = TASKS[name]
    for number in range(4):
        example = make(name, form, length, number=number)
        assert len(example.turns) == task.turns
        assert len({turn.question for turn in example.turns}) == task.turns
        # The oracle is handed nothing but the question.
        for turn in example.turns:
            blind = replace(turn, answers=("?",), choices=())
            solved = task.solve(replace(example, turns=()), blind)
            assert SCORERS[turn.scorer](turn, solved) == 1
            assert SCORERS[turn.scorer](turn, turn.answers[0]) == 1
            assert SCORERS[turn.scorer](turn, "") == 0
            assert turn.depth is None or 0 <= turn.depth < 1


@given(
    which=st.sampled_from(FORMS),
    length=st.integers(1024, 8192),
    turns=st.integers(1, 6),
    seed=st.integers(0, 999),
    number=st.integers(0, 999),
    count=st.sampled_from([quarters, words]),
)
@settings(max_examples=60, deadline=None)
def test_any_example_is_solvable_and_as_long_as_asked(which, length, turns, seed, number, count):
    name, form = which
    example = TASKS[name].make(form=form, length=length, seed=seed, number=number, turns=turns, count=count)
    assert len(example.turns) == turns
    if form == "text":
        assert abs(count(example.opening) - length) <= 0.05 * length
    for turn in example.turns:
        assert SCORERS[turn.scorer](turn, TASKS[name].solve(example, turn)) == 1


@pytest.mark.parametrize("name", TASKS)
def test_oracle_fails_where_the_context_is_of_another_example(name):
    # An oracle that knew the answers by other means than reading would still be right here.
    example, other = make(name, number=0), make(name, number=1)
    right = 0.0
    for turn in example.turns:
        try:
            solved = TASKS[name].solve(replace(example, context=other.context), turn)
        except (AssertionError, KeyError, ValueError):
            continue
        right += SCORERS[turn.scorer](turn, solved) == 1
    # A label or a choice can be right by chance, but not most of them.
    assert right <= len(example.turns) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_oracle_and_length_at_128k(name):
    example = make(name, length=131072)
    assert abs(quarters(example.opening) - 131072) <= 0.05 * 131072
    for turn in example.turns:
        assert SCORERS[turn.scorer](turn, TASKS[name].solve(example, turn)) == 1


@pytest.mark.parametrize("count", [quarters, words, len], ids=["quarters", "words", "characters"])
@pytest.mark.parametrize("length", [1024, 3000, 16384])
@pytest.mark.parametrize("name", TASKS)
def test_length_is_within_five_percent(name, length, count):
    if count is len:
        length *= 4
    example = TASKS[name].make(length=length, seed=2, count=count)
    assert abs(count(example.opening) - length) <= 0.05 * length


@pytest.mark.parametrize("name", [name for name, form in FORMS if form == "embedded"])
def test_embedded_length_in_the_models_own_tokens(name):
    counted = tokenizer()
    example = make(name, "embedded", 1024)
    tokens = len(counted(example.opening)["input_ids"])
    assert 0.95 * 1024 <= tokens <= 1024
    for turn in example.turns:
        assert (
            len(counted(" " + turn.answers[0], add_special_tokens=False)["input_ids"]) < turn.max_new_tokens
        )


def test_embedded_prompt_is_the_one_the_model_was_trained_on():
    example = make("vt", "embedded", number=3)
    document = documents.make("variables", tokens=1024, seed=7003, turns=5)
    for turn in range(5):
        assert prompt(example, turn) == documents.prompt(document, turn)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_count_is_asked_a_few_times_only(name, form):
    # Near-linear generation: the text is not tokenised again for every unit that is added.
    seen = []

    def count(text):
        seen.append(len(text))
        return quarters(text)

    example = TASKS[name].make(form=form, length=16384, seed=1, count=count)
    assert sum(seen) <= 12 * len(example.opening)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_same_arguments_same_bytes(name, form):
    one, two = make(name, form), make(name, form)
    assert one == two
    assert one.checksum == two.checksum
    sums = {make(name, form, number=number, seed=seed).checksum for number in range(3) for seed in (1, 2)}
    assert len(sums) == 6


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_bytes_are_pinned(name, form):
    assert make(name, form, number=1).checksum[:16] == PINNED[name, form]


def test_checksum_covers_every_byte_of_a_prompt():
    example = make("kv")
    turn = example.turns[0]
    changed = [
        replace(example, context=example.context + " "),
        replace(example, join=Join(opening="{context}")),
        replace(example, turns=(replace(turn, question="x"), *example.turns[1:])),
        replace(example, turns=(replace(turn, answers=("x",)), *example.turns[1:])),
        replace(example, turns=(replace(turn, scorer="label"), *example.turns[1:])),
    ]
    assert len({example.checksum, *(other.checksum for other in changed)}) == 6


@pytest.mark.parametrize("name", ["kv", "prefix-suffix", "vt", "joint-recall"])
def test_golden_answers_stand_in_no_other_example(name):
    # An answer that stood elsewhere, too, could be right for a wrong reason.
    examples = [make(name, number=number) for number in range(6)]
    for example in examples:
        for turn in example.turns:
            golden = turn.answers[0].split(", ")[0]
            assert [other.number for other in examples if golden in other.opening] == [example.number]


@pytest.mark.parametrize("name", ["kv", "prefix-suffix", "joint-recall", "summary", "mf", "qa-en", "qa-zh"])
def test_questions_do_not_hold_their_answers(name):
    for number in range(5):
        for turn in make(name, number=number).turns:
            assert turn.answers[0] not in turn.question


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_knobs_change_the_example_and_unknown_ones_are_refused(name, form):
    task = TASKS[name]
    with pytest.raises(ValueError, match="no knob"):
        make(name, form, knobs={"colour": 1})
    plain = make(name, form, length=2048)
    for knob, value in task.knobs(form).items():
        other = {"hops": 2 if value == 1 else 1, "scattered": 1, "near": 2, "contexts": 2}.get(
            knob, value + 2
        )
        changed = make(name, form, length=2048, knobs={knob: other})
        assert changed.checksum != plain.checksum
        for turn in changed.turns:
            assert SCORERS[turn.scorer](turn, task.solve(changed, turn)) == 1


def test_what_cannot_be_made_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="has no embedded form; it has text"):
        make("qa-en", "embedded")
    with pytest.raises(ValueError, match="cannot hold 20 turns"):
        make("summary", length=512, turns=20)
    with pytest.raises(ValueError, match="set chains higher"):
        make("vt", turns=7)
    with pytest.raises(ValueError, match="at most that many turns"):
        make("mf", turns=8)
    with pytest.raises(ValueError, match="more tokens or fewer turns"):
        make("repoqa", length=300, turns=12)
    with pytest.raises(ValueError, match=r"0\.\.999"):
        make("kv", seed=1000)
    with pytest.raises(ValueError, match="at least one turn"):
        make("kv", turns=0)
    with pytest.raises(ValueError, match="256 to 1048576"):
        make("kv", length=100)


def test_turns_are_spread_over_the_depth():
    example = make("kv", length=16384, turns=10)
    order = [turn.depth for turn in example.turns]
    assert order != sorted(order)
    for stretch, depth in enumerate(sorted(order)):
        assert stretch / 10 - 0.01 <= depth <= (stretch + 1) / 10 + 0.01


def test_depth_is_where_the_answer_lies():
    for name in ("kv", "prefix-suffix", "joint-recall", "repoqa", "summary-needles"):
        example = make(name, length=8192)
        for turn in example.turns:
            found = example.context.find(turn.answers[0].removeprefix("```python\n").removesuffix("\n```"))
            if found >= 0:
                assert abs(found / len(example.context) - turn.depth) < 0.02


def test_prompt_shows_earlier_turns():
    turns = tuple(
        Turn(question=f"q{i}", answers=(f"a{i}",), scorer="string", max_new_tokens=4, depth=None)
        for i in range(3)
    )
    join = Join(opening="<{context}>", question="[{question}]", answer="({answer})")
    example = Example(
        task="t",
        category="string",
        form="text",
        length=1,
        seed=0,
        number=0,
        context="{x}",
        turns=turns,
        join=join,
    )
    assert prompt(example, 0) == "<{x}>[q0]"
    assert prompt(example, 2) == "<{x}>[q0](a0)[q1](a1)[q2]"
    assert prompt(example, 2, ["{question}", " b "]) == "<{x}>[q0]({question})[q1](b)[q2]"
    assert prompt(example, 2, []) == "<{x}>[q2]"
    with pytest.raises(ValueError, match="needs 2 earlier answers or none"):
        prompt(example, 2, ["one"])


def test_joint_recall_needs_the_context():
    example = make("joint-recall", length=4096)
    for turn in example.turns:
        key = re.search(r"key (\w+)", turn.question)[1]
        assert len(set(re.findall(rf"^{key}: (\S+)$", example.context, re.MULTILINE))) > 10


def test_prefix_suffix_has_near_misses():
    example = make("prefix-suffix", length=4096)
    lines = example.context.split("\n")
    for turn in example.turns:
        goal = turn.answers[0]
        assert sum(line.startswith(goal[:8]) for line in lines) == 2
        assert sum(line.endswith(goal[-8:]) for line in lines) == 2


def test_choices_stand_in_the_chronicle():
    example = make("choice-en", length=8192)
    for turn in example.turns:
        assert len(set(turn.choices)) == 4
        assert all(choice in example.context for choice in turn.choices)
    letters = {turn.answers[0] for number in range(8) for turn in make("choice-en", number=number).turns}
    assert letters == set("ABCD")


def test_many_shot_asks_for_things_never_shown():
    for form, shown in (("text", "Thing: {}\n"), ("embedded", "label {} :")):
        example = make("many-shot", form)
        for turn in example.turns:
            assert shown.format(turn.question.removeprefix("label ")) not in example.context


def test_mf_has_an_odd_count_and_single_extremes():
    for number in range(4):
        numbers = [int(n) for n in re.findall(r"\d+", make("mf", number=number).context)]
        ordered = sorted(numbers)
        assert len(numbers) % 2 == 1
        assert len(set(ordered[:4])) == 4
        assert len(set(ordered[-4:])) == 4


def test_descriptions_are_not_in_the_code():
    example = make("repoqa", length=16384)
    for turn in example.turns:
        description = turn.question.split("\n", 1)[1]
        assert description not in " ".join(example.context.split())


def test_corpus_functions_are_distinct_and_parse_back():
    corpus = functions()
    assert len({function.name for function in corpus}) == len({f.description for f in corpus}) == len(corpus)
    text = make("repoqa", length=100_000).context
    found = parse(text)
    copies = [name for name in found if re.search(r"_2$", name)]
    assert copies, "100 000 tokens are more than the corpus"
    for function in corpus:
        assert found[function.name] == function.code


def test_haystack_leaves_out_what_is_asked_for():
    hidden = functions()[5:8]
    names = {function.name for function in haystack(Dice("x"), 2_000_000, hidden)}
    assert all(not any(name.startswith(h.name + "_2") or name == h.name for name in names) for h in hidden)


@pytest.mark.parametrize("language", [ENGLISH, CHINESE], ids=["english", "chinese"])
@pytest.mark.parametrize("hops", [1, 2])
@given(seed=st.integers(0, 10**6), size=st.integers(20, 400))
@settings(max_examples=25, deadline=None)
def test_every_fact_of_a_chronicle_can_be_read_back(language, hops, seed, size):
    dice = Dice(str(seed))
    facts, sentences = tell(dice, language, size)
    text = language.sentence.join(sentences)
    used = set()
    for _ in range(3):
        found = query(dice, language, facts, dice.below(size), hops, used)
        assert answer(language, text, found.question) == found.answer
        assert found.answer in sentences[found.source]
    assert len(used) == 3


@given(st.integers(1, 500), st.data())
def test_spread_takes_one_of_each_stretch(n, data):
    turns = data.draw(st.integers(1, n))
    chosen = spread(Dice("s"), n, turns)
    assert len(set(chosen)) == turns
    edges = [turn * n // turns for turn in range(turns + 1)]
    for place, (start, stop) in zip(sorted(chosen), pairwise(edges), strict=True):
        assert start <= place < stop
