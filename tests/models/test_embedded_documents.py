"""The generator: the same bytes everywhere, questions that its own text answers, seeds kept apart."""

import hashlib
import re
from dataclasses import replace

import pytest

from winnow.models.embedded import documents, language

TASKS = [("key-value", 1, 1), ("needles", 1, 1), ("variables", 1, 1), ("variables", 2, 1)] + [
    (task, hops, shots) for task in ("labels", "mixed") for hops, shots in ((1, 1), (2, 2))
]


def answer_from(text: str, question: str) -> str:
    """Answer a question from the text with nothing but its lines: the oracle."""
    kind, asked = question.split()[0], question.split()[-1]
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
        assert turn.question.split()[-1] in facts[0] or task in ("labels", "mixed")
        assert turn.answer in facts[-1]


def test_noun_asked_for_is_no_example():
    document = documents.make("labels", tokens=512, seed=0, turns=20, shots=2)
    assert all(f"{turn.question} :" not in document.text for turn in document.turns)


def test_same_bytes_everywhere():
    """A digest, so that another machine or Python that drew other documents would fail."""
    text = "".join(
        documents.prompt(documents.make(task, tokens=600, seed=7, turns=3), 2) for task in documents.TASKS
    )
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "d158d4341906fb5fb717e6d4a2eced24813a447554e6b1d5227562d8e4ffcff8"
    )


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
