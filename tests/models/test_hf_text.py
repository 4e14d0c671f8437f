"""Encoding, chat templates, and decoding one token at a time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from winnow.models.text import Text, TokenStream

CHAT = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no ' + m['role']) }}{% endif %}"
    "<s>{{ m['role'] }}:{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, as in the worst case of a byte-level vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template=CHAT)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Pieces with a leading space mark, and bytes for what has no piece, as Llama 2 has them."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefgh", "▁a", "▁bad"]
    tokenizer = Tokenizer(models.Unigram([(p, -float(len(p) == 1)) for p in pieces], 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TEXTS = {"byte-level": Text(byte_level()), "byte-fallback": Text(byte_fallback())}


@pytest.mark.parametrize("kind", TEXTS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab h  é€👩\u200d👧🏽\n漢")))
def test_pieces_join_to_the_whole(kind: str, text: str) -> None:
    coder = TEXTS[kind]
    ids = coder.encode(text, special=False)
    stream = coder.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == coder.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_still_end(ids: list[int]) -> None:
    """Held back for a few tokens at most, and never lost."""
    coder = TEXTS["byte-level"]
    stream = coder.stream()
    held, shown = 0, ""
    for i in ids:
        piece = stream.push(i)
        held = 0 if piece else held + 1
        shown += piece
        assert held < 8
    shown += stream.finish()
    if "\ufffd" not in coder.decode(ids):
        assert shown == coder.decode(ids)


def test_a_character_appears_with_its_last_byte() -> None:
    coder = TEXTS["byte-level"]
    stream = coder.stream()
    assert [stream.push(i) for i in coder.encode("é€", special=False)] == ["", "é", "", "", "€"]
    assert stream.finish() == ""


def test_long_streams_decode_short_tails() -> None:
    """The cost of a token does not grow with the text before it."""

    class Counting(Text):
        longest = 0

        def decode(self, token_ids: list[int]) -> str:  # type: ignore[override]
            self.longest = max(self.longest, len(token_ids))
            return super().decode(token_ids)

    coder = Counting(byte_level())
    stream = TokenStream(coder)
    for i in coder.encode("word " * 200, special=False):
        stream.push(i)
    assert coder.longest <= 4


def test_special_tokens() -> None:
    coder = TEXTS["byte-level"]
    plain = coder.encode("ab", special=False)
    assert coder.encode("ab") == [256, *plain]
    assert coder.decode([256, *plain]) == "ab"


def test_chat() -> None:
    coder = TEXTS["byte-level"]
    ids = coder.chat([{"role": "user", "content": "a"}])
    assert coder.tokenizer.decode(ids) == "<s>user:a<s>assistant:"
    with pytest.raises(ValueError, match="no system"):
        coder.chat([{"role": "system", "content": "a"}])
    with pytest.raises(ValueError, match="empty"):
        coder.chat([])
    with pytest.raises(ValueError, match="'role' and 'content'"):
        coder.chat([{"role": "user"}])
    assert not TEXTS["byte-fallback"].can_chat
    with pytest.raises(ValueError, match="no chat template"):
        TEXTS["byte-fallback"].chat([{"role": "user", "content": "a"}])


def test_a_template_cannot_reach_the_interpreter() -> None:
    coder = Text(byte_level())
    coder.tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="refuses"):
        coder.chat([{"role": "user", "content": "a"}])
