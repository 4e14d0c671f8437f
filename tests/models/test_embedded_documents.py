"""The generator: the same bytes everywhere, questions that its own text answers, seeds kept apart."""

import hashlib
import re
from collections import Counter
from dataclasses import replace

import pytest

from winnow.models.embedded import documents, language

TASKS = [("variables", 2, 1), ("labels", 2, 2), ("mixed", 2, 2)] + [(task, 1, 1) for task in documents.TASKS]


def only(found: list[str]) -> str:
    assert len(found) == 1
    return found[0]


def answer_from(text: str, question: str) -> str:
    """Answer a question from the text with nothing but its lines: the oracle."""
    kind, asked = question.split()[0], question.split()[-1]
    if kind == "string":
        start, end = asked.split("...")
        return only(re.findall(rf"^string ({start}\S+{end})$", text, re.M))
    if kind in ("largest", "smallest"):
        numbers = map(int, re.findall(rf"^{asked} (\d+)$", text, re.M))
        return str((max if kind == "largest" else min)(numbers))
    if kind == "context":
        _, heading, _, asked = question.split()
        section = only(re.findall(rf"^context {heading}\n((?:(?!context ).*\n)*)", text, re.M))
        return only(re.findall(rf"^key {asked} -> (\S+)$", section, re.M))
    if kind == "key":
        return re.search(rf"^key {asked} -> (\S+)$", text, re.M)[1]
    if kind == "the":
        return re.search(rf"^The code of {asked} is (\S+)\.$", text, re.M)[1]
    if kind == "label":
        category = next(c for c in language.CATEGORIES if f" {asked}" in c)
        told = {m[2] for m in re.finditer(r"^label (\w+) : (\w+)$", text, re.M) if f" {m[1]}" in category}
        assert len(told) == 1
        return told.pop()
    while not asked[0].isdigit():
        asked = re.search(rf"^set {asked} = (\S+)$", text, re.M)[1]
    return asked


@pytest.mark.parametrize(("task", "hops", "shots"), TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_text_answers_every_turn(task, hops, shots, seed):
    document = documents.make(task, tokens=1024, seed=seed, turns=8, hops=hops, shots=shots)
    assert len({turn.question for turn in document.turns}) == 8
    for turn in document.turns:
        assert answer_from(document.text, turn.question) == turn.answer
        assert documents.score(turn, f" {turn.reply}\nQ: more")
        assert not documents.score(turn, turn.reply + "0")
        assert not documents.score(turn, "")
        facts = [document.text[start:stop] for start, stop in turn.sources]
        named = turn.question.split()[-1] in " ".join(facts)
        assert named or turn.question.startswith("label ") or turn.question.startswith("string ")
        assert turn.answer in facts[-1]


def test_noun_asked_for_is_no_example():
    document = documents.make("labels", tokens=512, seed=0, turns=20, shots=2)
    assert all(f"{turn.question} :" not in document.text for turn in document.turns)


FIRST_TASKS = ("key-value", "needles", "variables", "labels")


@pytest.mark.parametrize(
    ("tasks", "digest"),
    [
        (FIRST_TASKS, "a36a590554415273e4ec8f169004eca5391903c7609a68b1fb6ae963f3e4a8fa"),
        (
            tuple(task for task in documents.TASKS if task not in FIRST_TASKS),
            "737b13395710819381996bc7aadfbdfc187227cde821e1e1d1466701259048c2",
        ),
    ],
)
def test_same_bytes_everywhere(tasks, digest):
    """A digest, so that another machine or Python that drew other documents would fail."""
    text = "".join(documents.prompt(documents.make(task, tokens=600, seed=7, turns=3), 2) for task in tasks)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize("facts", [1, 2, 3, 8, 32, 100])
def test_strings_need_both_ends(facts):
    document = documents.make("prefix-suffix", tokens=1024, seed=facts, facts=facts, turns=1)
    ends = [(s[:2], s[-3:]) for s in re.findall(r"^string (\S+)$", document.text, re.M)]
    assert len(set(ends)) == len(ends) == facts
    if facts >= 32:
        for part in zip(*ends, strict=True):
            shared = Counter(part).values()
            assert min(shared) >= 2
            assert max(shared) <= 11


def test_extremes_are_hard_to_guess():
    answers = Counter(
        turn.answer
        for seed in range(50)
        for turn in documents.make("extrema", tokens=300, seed=seed, turns=8).turns
        if turn.question.startswith("largest")
    )
    assert sum(answers.values()) == 200
    assert answers.most_common(1)[0][1] <= 30


def test_every_key_stands_in_every_context():
    document = documents.make("joint-recall", tokens=1024, seed=1, facts=32, contexts=4, turns=32)
    sections = document.text.split("context ")[1:]
    keys = [sorted(re.findall(r"^key (\S+)", section, re.M)) for section in sections]
    assert len(keys) == 4
    assert all(names == keys[0] and len(set(names)) == 8 for names in keys)
    values = re.findall(r"-> (\S+)", document.text)
    assert len(set(values)) == 32
    assert len({turn.question.split()[1] for turn in document.turns}) == 4


@pytest.mark.parametrize("mixture", documents.MIXTURES)
def test_every_kind_of_a_mixture_is_asked(mixture):
    kinds = documents.MIXTURES[mixture]
    document = documents.make(mixture, tokens=1024, seed=2, turns=2 * len(kinds))
    asked = Counter(turn.question.split()[0] for turn in document.turns)
    assert sorted(asked.values()) == [2] * len(kinds)
    names = re.findall(r"^(?:key|set|The code of) (\S+)", document.text, re.M)
    assert len(set(names)) == len(names) or mixture.startswith("joint-recall")


def test_seed_and_arguments_matter():
    texts = {documents.make("needles", tokens=600, seed=seed).text for seed in range(20)}
    texts.add(documents.make("needles", tokens=601, seed=0).text)
    assert len(texts) == 21


@pytest.mark.parametrize("tokens", [300, 1024, 4000])
def test_length_is_filled_and_never_exceeded(tokens):
    tokenizer = language.tokenizer()
    for seed in range(5):
        document = documents.make("key-value", tokens=tokens, seed=seed)
        assert tokens - 16 <= document.tokens <= tokens
        assert len(tokenizer(document.text)["input_ids"]) == document.tokens


def test_history_replaces_the_replies():
    document = documents.make("key-value", tokens=512, seed=1, turns=3)
    assert "A: nonsense\n" in documents.prompt(document, 1, ["nonsense"])
    assert documents.prompt(document, 2).endswith(f"Q: {document.turns[2].question} A:")
    with pytest.raises(ValueError, match="needs 2 earlier"):
        documents.prompt(document, 2, ["one"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "riddles"}, "choose one of"),
        ({"tokens": 100}, "allow more tokens"),
        ({"turns": 33}, "at most that many turns"),
        ({"seed": -1}, "seed >= 0"),
        ({"hops": 0}, "hops >= 1"),
        ({"shots": 12}, "shots < 12"),
        ({"task": "joint-recall", "contexts": 1}, "2 to 24 contexts"),
        ({"task": "joint-recall", "facts": 3, "turns": 1}, "a fact for each"),
        ({"task": "extrema", "facts": 1, "turns": 1}, "2 to 360 facts"),
        ({"task": "extrema", "turns": 9}, "have 8 questions"),
    ],
)
def test_impossible_documents_are_refused(change, message):
    arguments = {"task": "key-value", "tokens": 512, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        documents.make(**arguments)


def test_score_takes_the_end_of_the_chain():
    turn = documents.make("variables", tokens=512, seed=0, hops=2).turns[0]
    assert documents.score(turn, turn.reply)
    assert documents.score(turn, turn.answer)
    assert not documents.score(replace(turn, answer="99-99x"), turn.reply)
