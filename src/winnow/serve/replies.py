"""Answers in OpenAI's form: whole, or chunk by chunk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from winnow.serve.job import Piece
from winnow.serve.tools import Call, Reader

__all__ = ["ChatReply", "CompletionReply", "Reply", "usage"]

TokenText = Callable[[int], str]
_LOWEST = -9999.0  # stands for minus infinity, which JSON lacks


def usage(prompts: Sequence[int], stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ``usage`` object over the jobs of one request.

    ``cached_tokens`` are prompt tokens whose exact entries were not computed again;
    ``approximate_tokens`` (ours) those whose entries were computed in another context, or rounded.
    """
    prompt = sum(prompts)
    generated = sum(one["tokens_generated"] for one in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(one["tokens_reused"] for one in stats),
            "approximate_tokens": sum(one["tokens_approximate"] for one in stats),
        },
    }


class Reply(Protocol):
    """Collects what the samples of a request give."""

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Take a token of choice ``index``; what a stream sends for it."""
        ...

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """The usage chunk that ends a stream where it was asked for."""
        ...

    def whole(self, used: dict[str, Any]) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        ...


@dataclass(kw_only=True)
class _Choice:
    text: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    unsent: list[dict[str, Any]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish_reason: str = ""
    reader: Reader | None = None
    begun: bool = False
    offset: int = 0


class _Head:
    """What every chunk and every answer begins with."""

    def __init__(self, kind: str, prefix: str, model: str, *, with_usage: bool) -> None:
        self.fields = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        # A stream that will end with a usage chunk says "null" until then.
        self.tail = {"usage": None} if with_usage else {}

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return {**self.fields, "choices": list(choices), **self.tail}

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        return {**self.fields, "choices": [], "usage": used}


class ChatReply:
    """``chat.completion`` and ``chat.completion.chunk``.

    Parameters
    ----------
    model : str
    stream, with_usage : bool
    choices : int
    token_text : callable
        What one token stands for, for ``logprobs``.
    reader : callable
        Makes what reads tool calls of one choice; may give None.
    named : bool
        One function was demanded by name: ``finish_reason`` then stays ``stop``, as OpenAI has it.
    most_calls : int or None
        Tool calls of a choice after the first so many are left out.
    """

    def __init__(
        self,
        model: str,
        *,
        stream: bool,
        with_usage: bool,
        choices: int,
        token_text: TokenText,
        reader: Callable[[], Reader | None],
        named: bool = False,
        most_calls: int | None = None,
    ) -> None:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        self._head = _Head(kind, "chatcmpl", model, with_usage=with_usage)
        self._choices = [_Choice(reader=reader()) for _ in range(choices)]
        self._token_text = token_text
        self._named = named
        self._most_calls = most_calls

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """See :class:`Reply`."""
        choice = self._choices[index]
        sent: list[dict[str, Any]] = []

        def send(delta: dict[str, Any], reason: str | None = None) -> None:
            records, choice.unsent = choice.unsent, []
            sent.append(
                self._head.chunk(
                    {
                        "index": index,
                        "delta": delta,
                        "logprobs": {"content": records, "refusal": None} if records else None,
                        "finish_reason": reason,
                    }
                )
            )

        if not choice.begun:
            choice.begun = True
            send({"role": "assistant", "content": ""})
        if piece.logprob is not None:
            record = _chat_record(piece.logprob, self._token_text)
            choice.records.append(record)
            choice.unsent.append(record)
        text, calls = self._read(choice, piece)
        choice.text += text
        if text or (choice.unsent and not piece.finish_reason):
            send({"content": text})
        room = None if self._most_calls is None else self._most_calls - len(choice.calls)
        for call in calls[:room]:
            send({"tool_calls": [{"index": len(choice.calls), **call}]})
            choice.calls.append(call)
        if piece.finish_reason:
            choice.finish_reason = self._reason(choice, piece.finish_reason)
            send({}, choice.finish_reason)
        return sent

    @staticmethod
    def _read(choice: _Choice, piece: Piece) -> tuple[str, list[Call]]:
        if choice.reader is None:
            return piece.text, []
        text, calls = choice.reader.push(piece.text)
        if piece.finish_reason:
            more, last = choice.reader.finish()
            text, calls = text + more, [*calls, *last]
        return text, calls

    def _reason(self, choice: _Choice, reason: str) -> str:
        return "tool_calls" if choice.calls and reason == "stop" and not self._named else reason

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """See :class:`Reply`."""
        return self._head.last(used)

    def whole(self, used: dict[str, Any]) -> dict[str, Any]:
        """See :class:`Reply`."""
        choices = []
        for index, choice in enumerate(self._choices):
            message: dict[str, Any] = {
                "role": "assistant",
                "content": choice.text if choice.text or not choice.calls else None,
                "refusal": None,
            }
            if choice.calls:
                message["tool_calls"] = choice.calls
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": {"content": choice.records, "refusal": None} if choice.records else None,
                    "finish_reason": choice.finish_reason,
                }
            )
        return {**self._head.fields, "choices": choices, "usage": used}


class CompletionReply:
    """``text_completion``, whole or in chunks.

    Parameters
    ----------
    model : str
    with_usage : bool
    echo : sequence of str
        Per choice the text to put before the answer; empty strings without ``echo``.
    token_text : callable
    """

    def __init__(self, model: str, *, with_usage: bool, echo: Sequence[str], token_text: TokenText) -> None:
        self._head = _Head("text_completion", "cmpl", model, with_usage=with_usage)
        self._choices = [_Choice(text=text) for text in echo]
        self._token_text = token_text

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """See :class:`Reply`."""
        choice = self._choices[index]
        text = piece.text if choice.begun else choice.text + piece.text
        choice.begun = True
        choice.text += piece.text
        if piece.logprob is not None:
            record = {**_completion_record(piece.logprob, self._token_text), "text_offset": choice.offset}
            choice.offset += len(record["token"])
            choice.records.append(record)
            choice.unsent.append(record)
        choice.finish_reason = piece.finish_reason
        if not (text or choice.unsent or piece.finish_reason):
            return []
        records, choice.unsent = choice.unsent, []
        return [self._head.chunk(_completion_choice(index, text, records, piece.finish_reason))]

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """See :class:`Reply`."""
        return self._head.last(used)

    def whole(self, used: dict[str, Any]) -> dict[str, Any]:
        """See :class:`Reply`."""
        choices = [
            _completion_choice(index, choice.text, choice.records, choice.finish_reason)
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head.fields, "choices": choices, "usage": used}


def _completion_choice(index: int, text: str, records: list[dict[str, Any]], reason: str) -> dict[str, Any]:
    logprobs = None
    if records:
        logprobs = {
            "tokens": [one["token"] for one in records],
            "token_logprobs": [one["logprob"] for one in records],
            "top_logprobs": [one["top"] for one in records],
            "text_offset": [one["text_offset"] for one in records],
        }
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason or None}


def _chat_record(record: dict[str, Any], token_text: TokenText) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(token)
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(text.encode())}

    return {
        **entry(record["token_id"], record["logprob"]),
        "top_logprobs": [entry(token, logprob) for token, logprob in record["top"]],
    }


def _completion_record(record: dict[str, Any], token_text: TokenText) -> dict[str, Any]:
    own = token_text(record["token_id"])
    top = {token_text(token): max(logprob, _LOWEST) for token, logprob in record["top"]}
    # The token that was drawn is always among them, as OpenAI has it.
    return {
        "token": own,
        "logprob": max(record["logprob"], _LOWEST),
        "top": {**top, own: max(record["logprob"], _LOWEST)},
    }
