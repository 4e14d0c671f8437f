"""Peers: other libraries that hold the same conversations, under the same clock.

==============================  ==============================================================
``hf:dynamic``                  `transformers` with its default cache
``hf:quantized[@BITS]``         its quantised cache (needs optimum-quanto or hqq)
``kvpress:PRESS[@RATIO]``       a press of kvpress that drops the share RATIO of the entries
``llama.cpp``                   llama.cpp on the same weights (extra ``peers``)
==============================  ==============================================================

The first three run in a process of their own (:mod:`winnow.bench.lifecycle.worker`), by default
with this interpreter. A peer that cannot run is reported as missing, with the reason.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from winnow import api
from winnow.bench.lifecycle.llama import LlamaSystem
from winnow.bench.lifecycle.record import Reply
from winnow.bench.lifecycle.system import Conversation, System
from winnow.bench.llama_cpp import available
from winnow.models import embedded

__all__ = ["MissingPeerError", "Peer", "check", "open_peer"]

_NAME = re.compile(r"(llama\.cpp|hf:dynamic|hf:quantized(@[248])?|kvpress:\w+(@0?\.\d+)?)")
_REMEDY = {
    "kvpress": "install kvpress for an interpreter of its own and give that as --peer-python kvpress=PATH",
    "hf:quantized": "pip install optimum-quanto",
}
# In a folder of its own: a script sees its neighbours before other packages of the same name.
_WORKER = Path(__file__).parent / "worker" / "__main__.py"


class MissingPeerError(Exception):
    """A peer that cannot take part, or cannot go on; the text is the reason and a remedy."""


class Peer(System, Protocol):
    """A system that is not Winnow."""

    @property
    def about(self) -> dict[str, Any]:
        """``versions``, ``nominal`` (share of the bytes that its parameters say stays) and ``note``."""
        ...


def check(name: str) -> None:
    """Raise ``ValueError`` for a name that means no peer, saying what does."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"cannot read the peer {name!r}; write hf:dynamic, hf:quantized, hf:quantized@2, llama.cpp, "
            "or a press and the share that it drops, such as kvpress:SnapKVPress@0.5"
        )


@contextmanager
def open_peer(name: str, llm: api.LLM, *, pythons: Mapping[str, str], room: int) -> Iterator[Peer]:
    """Start a peer on the weights of a model.

    Parameters
    ----------
    name : str
        See the module's text.
    llm : LLM
        Gives the model's name, dtype and end-of-sequence tokens, and the tokenizer for all.
    pythons : mapping
        Interpreter by library (``hf``, ``kvpress``); ``""`` stands for those that are not named.
    room : int
        Most tokens of a conversation, for peers that reserve memory.

    Raises
    ------
    MissingPeerError
        The peer cannot run here.
    """
    if name == "llama.cpp":
        if reason := available():
            raise MissingPeerError(reason)
        try:
            system = LlamaSystem(llm, room)
        except ValueError as error:
            raise MissingPeerError(str(error)) from error
        try:
            yield system
        finally:
            system.close()
        return
    python = pythons.get(name.partition(":")[0], pythons.get("", sys.executable))
    with _Process(name, llm, python) as process:
        yield process


class _Process:
    """A peer in a process of its own; see :mod:`winnow.bench.lifecycle.worker` for what is said."""

    def __init__(self, name: str, llm: api.LLM, python: str) -> None:
        self.name = name
        self._llm = llm
        model = str(embedded.path()) if llm.model.name == "embedded" else llm.model.name
        try:
            self._child = subprocess.Popen(
                [python, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                bufsize=1,
            )
        except OSError as error:
            raise MissingPeerError(f"the interpreter {python} does not start: {error.strerror}") from error
        self.about = self._say(
            {
                "peer": name,
                "model": model,
                "dtype": str(llm.model.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "eos": list(llm.model.eos_token_ids),
            }
        )

    def _say(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._child.wait()
            raise MissingPeerError(f"its process ended with code {code}; {self._remedy()}")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise MissingPeerError(f"{told['error']}; {self._remedy()}")
        return told

    def _remedy(self) -> str:
        known = [remedy for prefix, remedy in _REMEDY.items() if self.name.startswith(prefix)]
        return known[0] if known else "give --peer-python an interpreter with transformers"

    def call(self, op: str, **arguments: Any) -> Any:
        """One request and its answer."""
        return self._say({"op": op, **arguments})["ok"]

    @contextmanager
    def open(self, *, requests: bool) -> Iterator[Conversation]:
        """See :class:`System`."""
        self.call("open")
        yield _Talk(self, self._llm)

    def resident(self) -> int | None:
        """See :class:`System`."""
        found: int | None = self.call("resident")
        return found

    def peak(self) -> int | None:
        """See :class:`System`."""
        found: int | None = self.call("peak")
        return found

    def __enter__(self) -> _Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.communicate()


class _Talk:
    """A conversation in the peer's process; tokens are made here, so that all systems get the same."""

    replayed = 0

    def __init__(self, process: _Process, llm: api.LLM) -> None:
        self._process, self._llm = process, llm
        self._begun = False

    def _ids(self, text: str) -> list[int]:
        ids = self._llm.tokens(text, special=not self._begun)
        self._begun = True
        return ids

    def read(self, text: str) -> Reply:
        return Reply(**self._process.call("read", ids=self._ids(text)))

    def ask(self, text: str, *, max_new_tokens: int, stop: tuple[str, ...]) -> Reply:
        ids = self._ids(text)
        return Reply(**self._process.call("ask", ids=ids, max_new_tokens=max_new_tokens, stop=list(stop)))

    def take_back(self) -> None:
        self._process.call("take_back")

    @contextmanager
    def branch(self) -> Iterator[Conversation]:
        self._process.call("branch")
        yield self
        self._process.call("leave")

    def head_bytes(self) -> list[list[int]] | None:
        return None

    def entries(self) -> int | None:
        return None
