"""Tool calls: what a model writes, read back as OpenAI's ``tool_calls``.

The chat template shows the tools to the model. Where the client demands a call (``required``, or one
function by name) a grammar makes the model write one, whatever its own form; of its own accord a model
writes calls in the form that it was trained on, of which two are read here:

``hermes``
    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes, Qwen)
``json``
    the whole answer is ``{"name": ..., "parameters": {...}}`` (Llama 3)
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from winnow.serve.schema import ChatRequest, Tool, ToolChoice

__all__ = ["Hermes", "Json", "Reader", "demanded", "reader", "schema_of"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
Call = dict[str, Any]


class Reader(Protocol):
    """Reads the text of one answer as it comes."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Text that is no tool call, and the calls that are complete."""
        ...

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, at the end of the answer."""
        ...


def reader(kind: str, template: str) -> Reader | None:
    """A fresh reader for a model whose chat template is ``template``, or None."""
    if kind == "auto":
        kind = "hermes" if _OPEN in template else "json" if '"parameters"' in template else "none"
    if kind == "hermes":
        return Hermes()
    return Json() if kind == "json" else None


def demanded(request: ChatRequest) -> list[Tool] | None:
    """The tools of which one must be called; None where the model is free."""
    choice = request.tool_choice
    if isinstance(choice, ToolChoice):
        return [t for t in request.tools or () if t.function.name == choice.function.name]
    return list(request.tools or ()) if choice == "required" else None


def schema_of(tools: Sequence[Tool]) -> dict[str, Any]:
    """JSON schema of a call of one of ``tools``."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _call(written: object) -> Call | None:
    """A call as the interface has it, from what a model wrote; None where it is no call."""
    if not isinstance(written, dict) or not isinstance(written.get("name"), str):
        return None
    arguments = written.get("arguments", written.get("parameters"))
    if isinstance(arguments, str):
        text = arguments
    elif isinstance(arguments, dict):
        text = json.dumps(arguments, ensure_ascii=False)
    else:
        return None
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": written["name"], "arguments": text},
    }


def _parsed(text: str) -> Call | None:
    try:
        return _call(json.loads(text))
    except ValueError:
        return None


class Json:
    """The whole answer is one call, or none of it is."""

    def __init__(self) -> None:
        self._held = ""
        self._plain = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """See :class:`Reader`. Holds back as long as the answer may still be a call."""
        if self._plain:
            return text, []
        self._held += text
        start = self._held.lstrip()
        if start and not start.startswith("{"):
            self._plain = True
            shown, self._held = self._held, ""
            return shown, []
        return "", []

    def finish(self) -> tuple[str, list[Call]]:
        """See :class:`Reader`."""
        call = _parsed(self._held)
        return ("", [call]) if call is not None else (self._held, [])


class Hermes:
    """Calls between tags, with text around them."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """See :class:`Reader`."""
        self._held += text
        shown = ""
        calls: list[Call] = []
        while True:
            at = self._held.find(_OPEN)
            if at < 0:
                keep = next(
                    (
                        n
                        for n in range(min(len(_OPEN) - 1, len(self._held)), 0, -1)
                        if _OPEN.startswith(self._held[-n:])
                    ),
                    0,
                )
                cut = len(self._held) - keep
                shown, self._held = shown + self._held[:cut], self._held[cut:]
                return shown, calls
            end = self._held.find(_CLOSE, at)
            if end < 0:
                shown, self._held = shown + self._held[:at], self._held[at:]
                return shown, calls
            call = _parsed(self._held[at + len(_OPEN) : end])
            shown += self._held[:at]
            rest = self._held[end + len(_CLOSE) :]
            if call is None:
                shown += self._held[at : end + len(_CLOSE)]
            else:
                calls.append(call)
                rest = re.sub(r"^\s*(?=<tool_call>)", "", rest)
            self._held = rest

    def finish(self) -> tuple[str, list[Call]]:
        """See :class:`Reader`. A call whose closing tag is missing still counts where it parses."""
        text, self._held = self._held, ""
        if text.startswith(_OPEN) and (call := _parsed(text[len(_OPEN) :])) is not None:
            return "", [call]
        return text, []
