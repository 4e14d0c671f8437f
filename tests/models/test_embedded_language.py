"""The tokenizer: any text survives, and the generator's pieces are found again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.models.embedded import documents, language

TOKENIZER = language.tokenizer()
TEXT = st.text(max_size=60).filter(lambda text: not any(token in text for token in language.SPECIAL))


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_any_text_survives(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text", ["<0x41>", "  a  b ", "\r\n\t x", "▁x▁", "don't , stop .", "\U0001f600é", ""]
)
def test_awkward_text_survives(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("task", documents.TASKS)
def test_pieces_are_found_again(task):
    ids = language.identifiers()
    for seed in range(20):
        document = documents.make(task, tokens=600, seed=seed, turns=4, hops=1 + seed % 2)
        pieces = [language.BOS, *document.pieces]
        for turn in document.turns[:3]:
            pieces += (*turn.question_pieces, *turn.reply_pieces)
        pieces += document.turns[3].question_pieces
        assert TOKENIZER(documents.prompt(document, 3))["input_ids"] == [ids[piece] for piece in pieces]


def test_chat_is_the_trained_form():
    document = documents.make("variables", tokens=512, seed=0, turns=3)
    messages = [{"role": "system", "content": document.text}]
    for turn in document.turns[:2]:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.reply})
    messages.append({"role": "user", "content": document.turns[2].question})
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == language.BOS + documents.prompt(document, 2)


def test_document_may_stand_in_the_first_question():
    document = documents.make("key-value", tokens=512, seed=0, turns=1)
    messages = [{"role": "user", "content": document.text + document.turns[0].question}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == language.BOS + documents.prompt(document, 0)


def test_vocabulary_is_free_of_duplicates_and_small():
    pieces = language.vocabulary()
    assert len(set(pieces)) == len(pieces) <= 2048
    nouns = [noun for category in language.CATEGORIES for noun in category]
    assert len(set(nouns)) == 96
    assert not set(nouns) & set(language.FILLER + language.LABELS)
    assert not set(language.CONTEXTS) & set(language.FILLER + language.LABELS + tuple(nouns))
    assert len(set(language.CONTEXTS)) == 24
