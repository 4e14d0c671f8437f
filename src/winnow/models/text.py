"""Text and tokens: encoding, chat templates and decoding token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

__all__ = ["Text", "TokenStream"]

# What a decoder puts where bytes are no complete character (yet).
_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, a token at least one; beyond this the bytes are simply not UTF-8.
_LONGEST_WAIT = 8


class Text:
    """A tokenizer as the engine's front door uses it.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; ``special`` adds what the tokenizer puts around a whole text."""
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out, spaces as the tokenizer has them."""
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    @property
    def can_chat(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return bool(self.tokenizer.chat_template)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers.

        The template is a program that came with the model; `transformers` runs it in Jinja's sandbox.

        Parameters
        ----------
        messages : sequence of {"role": str, "content": str}
            Further fields (``tool_calls``, ``tool_call_id``, ``name``) reach the template as they are.
        tools : sequence of dict or None
            Functions as OpenAI's interface describes them; a template without tools ignores them.

        Raises
        ------
        ValueError
            Without a chat template, or where the template refuses the conversation.
        """
        if not messages:
            raise ValueError("the conversation is empty; give at least one message")
        for message in messages:
            if not {"role", "content"} <= set(message):
                raise ValueError(
                    "a message needs 'role' and 'content', as in {'role': 'user', 'content': 'Hi'}"
                )
        if not self.can_chat:
            raise ValueError("this model's tokenizer has no chat template; use generate with a plain prompt")
        try:
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:
            raise ValueError(
                f"the chat template refuses this conversation ({error}); change the order of roles"
            ) from error
        return [int(i) for i in ids]

    def stream(self) -> TokenStream:
        """A fresh :class:`TokenStream`."""
        return TokenStream(self)


class TokenStream:
    """Decodes tokens one by one; the pieces joined are the text of all tokens together.

    A token's text can depend on the token before it (spaces) and be completed by those after it
    (bytes of one character). So each piece is the growth of the text of a short tail of tokens, and
    is held back while it ends inside a character.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._context = 0  # first token of the tail
        self._shown = 0  # tokens whose text was returned

    def push(self, token: int) -> str:
        """Text that became final with this token; may be empty."""
        self._ids.append(token)
        return self._advance(hold=len(self._ids) - self._shown < _LONGEST_WAIT)

    def finish(self) -> str:
        """What was still held back."""
        return self._advance(hold=False)

    def _advance(self, *, hold: bool) -> str:
        shown = self._text.decode(self._ids[self._context : self._shown])
        tail = self._text.decode(self._ids[self._context :])
        if len(tail) <= len(shown) or (hold and tail.endswith(_REPLACEMENT)):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return tail[len(shown) :]
