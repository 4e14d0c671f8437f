"""A peer in an interpreter of its own: `transformers` with one of its caches, or kvpress.

A script, not a module: it needs PyTorch and `transformers` (and what the peer needs) but nothing
of Winnow, so that it runs where versions differ. One JSON object comes in per line, one goes out:

==============  ======================================  =====================================
``op``          with                                    gives
==============  ======================================  =====================================
``hello``       peer, model, dtype, threads, eos        versions, nominal, note
``open``                                                an empty cache
``read``        ids                                     a reply (see ``_reply``)
``ask``         ids, max_new_tokens, stop               a reply
``take_back``                                           the cache as before the last answer
``branch``                                              a mark to go back to
``leave``                                               the cache as at the mark
``resident``                                            bytes; the peak is counted from here
``peak``                                                bytes
==============  ======================================  =====================================

An error is ``{"error": ...}`` and ends the process where it comes from ``hello``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

_QUANTIZED_BITS = 4
_BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


class MissingError(Exception):
    """The peer cannot take part here; the text says what is missing."""


class Peer:
    """What a peer's name says: how its cache is made and what acts on the prefill."""

    def __init__(self, name: str, model: Any) -> None:
        library, _, rest = name.partition(":")
        kind, _, value = rest.partition("@")
        self.model = model
        self.press: Any = None
        self.nominal = 1.0
        self.note = ""
        self._bits = 0
        if library == "kvpress":
            self.press = _press(kind, float(value or 0.5))
            self.nominal = 1.0 - float(value or 0.5)
        elif kind == "quantized":
            self._bits = int(value or _QUANTIZED_BITS)
            self._backend = _quantizer()
            self.nominal = self._bits / (8 * model.dtype.itemsize)
            self.note = f"{self._backend}, {self._bits} bits"

    def cache(self) -> Any:
        """An empty cache."""
        from transformers import DynamicCache, QuantizedCache

        if self._bits:
            return QuantizedCache(backend=self._backend, config=self.model.config, nbits=self._bits)
        return DynamicCache(config=self.model.config)

    def prefilling(self) -> AbstractContextManager[Any]:
        """What surrounds the first prefill of a conversation: the press compresses at its end."""
        return nullcontext() if self.press is None else self.press(self.model)


def _press(kind: str, ratio: float) -> Any:
    try:
        presses = importlib.import_module("kvpress")
    except ImportError as error:
        raise MissingError(f"kvpress cannot be imported ({error})") from error
    if not hasattr(presses, kind):
        raise MissingError(f"this kvpress has no {kind}")
    return getattr(presses, kind)(compression_ratio=ratio)


def _quantizer() -> str:
    for backend, module in _BACKENDS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return backend
    raise MissingError("neither optimum-quanto nor hqq can be imported")


class Talk:
    """One conversation: a cache, the tokens that it has not seen yet, and the way back."""

    def __init__(self, peer: Peer, tokenizer: Any, eos: list[int]) -> None:
        self._peer, self._tokenizer, self._eos = peer, tokenizer, set(eos)
        self._cache = peer.cache()
        self._position = 0
        self._pending: list[int] = []
        self._before_answer: Mark | None = None
        self._branch: tuple[Mark, list[int]] | None = None

    def _forward(self, ids: list[int], around: AbstractContextManager[Any]) -> int:
        """Run tokens through the model; the likeliest next one."""
        positions = torch.arange(self._position, self._position + len(ids))
        with around:
            out = self._peer.model(
                input_ids=torch.tensor([ids]),
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._position += len(ids)
        return int(out.logits[0, -1].argmax())

    @torch.inference_mode()
    def ask(self, ids: list[int], max_new_tokens: int, stop: list[str]) -> dict[str, Any]:
        """Append tokens and generate greedily."""
        new = [*self._pending, *ids]
        reused, first = self._position, self._position == 0
        begun = time.perf_counter()
        token = self._forward(new, self._peer.prefilling() if first else nullcontext())
        first_at = time.perf_counter()
        # Keeping the way back is the benchmark's need, not the peer's: it stands outside the clock.
        self._before_answer = Mark(self._cache, self._position)
        decoding = time.perf_counter()
        generated = [token]
        text, reason = self._ended(generated, max_new_tokens, stop)
        while not reason:
            generated.append(token := self._forward([token], nullcontext()))
            text, reason = self._ended(generated, max_new_tokens, stop)
        ended = time.perf_counter()
        self._pending = [token]
        return self._reply(
            text=text,
            finish_reason=reason,
            tokens_computed=len(new),
            tokens_reused=reused,
            tokens_generated=len(generated),
            time_to_first_token=first_at - begun,
            decode_seconds=ended - decoding,
        )

    def _ended(self, generated: list[int], most: int, stop: list[str]) -> tuple[str, str]:
        text = self._tokenizer.decode(generated, skip_special_tokens=True)
        cuts = [at for word in stop if (at := text.find(word)) >= 0]
        if cuts:
            return text[: min(cuts)], "stop"
        if generated[-1] in self._eos:
            return text, "stop"
        return text, "length" if len(generated) >= most else ""

    def _reply(self, **told: Any) -> dict[str, Any]:
        return {**told, "bytes_stored": stored(self._cache)}

    @torch.inference_mode()
    def read(self, ids: list[int]) -> dict[str, Any]:
        """Append tokens and answer nothing."""
        reply = self.ask(ids, 1, [])
        self._pending = []
        return reply

    def take_back(self) -> None:
        """Forget the last answer."""
        assert self._before_answer is not None, "nothing was asked"
        self._cache, self._position = self._before_answer.restore()
        self._pending = []

    def branch(self) -> None:
        """Remember where the conversation stands."""
        self._branch = (Mark(self._cache, self._position), list(self._pending))

    def leave(self) -> None:
        """Go back to where :meth:`branch` was called."""
        assert self._branch is not None, "no branch is open"
        mark, self._pending = self._branch
        self._cache, self._position = mark.restore()


class Mark:
    """A state of a cache to go back to.

    The layers of `transformers` put new tensors into the place of old ones and never write into
    them, so that remembering which they had is enough. Layers that only grow at the end are cut
    instead: what they had is not held a second time.
    """

    def __init__(self, cache: Any, position: int) -> None:
        self._cache, self._position = cache, position
        self._states = [
            layer.get_seq_length() if type(layer).__name__ == "DynamicLayer" else dict(vars(layer))
            for layer in cache.layers
        ]

    def restore(self) -> tuple[Any, int]:
        """The cache as it was, and the position."""
        for layer, state in zip(self._cache.layers, self._states, strict=True):
            if isinstance(state, int):
                # A copy, so that what is cut off is freed and not counted.
                layer.keys = layer.keys[:, :, :state].clone()
                layer.values = layer.values[:, :, :state].clone()
            else:
                vars(layer).clear()
                vars(layer).update(state)
        return self._cache, self._position


def stored(cache: Any) -> dict[str, int]:
    """Bytes of the memory behind the tensors that a cache holds, each block once, by dtype."""
    held: dict[str, int] = {}
    blocks: set[int] = set()
    for tensor in _tensors(vars(cache), set()):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in blocks:
            blocks.add(storage.data_ptr())
            name = f"host/{str(tensor.dtype).removeprefix('torch.')}"
            held[name] = held.get(name, 0) + storage.nbytes()
    return held


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Plain tensors inside of lists, mappings, objects and wrapped tensors."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if type(value) is torch.Tensor:
        yield value
    elif isinstance(value, torch.Tensor):
        names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            yield from _tensors(getattr(value, name), seen)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif type(value).__module__.startswith("transformers.cache_utils"):
        yield from _tensors(vars(value), seen)


def _resident(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _restart() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _load(hello: dict[str, Any]) -> tuple[Peer, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingError(f"transformers cannot be imported ({error})") from error
    torch.set_num_threads(hello["threads"])
    local = Path(hello["model"]).is_dir()
    model = AutoModelForCausalLM.from_pretrained(
        hello["model"], dtype=getattr(torch, hello["dtype"]), local_files_only=local
    )
    tokenizer = AutoTokenizer.from_pretrained(hello["model"], local_files_only=local)
    return Peer(hello["peer"], model.eval()), tokenizer


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "kvpress", "optimum-quanto", "hqq"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Serve requests until the input ends."""
    # Libraries print; standard output belongs to the protocol alone.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    hello = json.loads(sys.stdin.readline())
    try:
        peer, tokenizer = _load(hello)
    except MissingError as error:
        print(json.dumps({"error": str(error)}), file=out)
        return
    except Exception as error:  # whatever a foreign library raises is the reason to give
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out)
        return
    told = {"versions": _versions(), "nominal": peer.nominal, "note": peer.note}
    print(json.dumps(told), file=out)
    talk = Talk(peer, tokenizer, hello["eos"])
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        try:
            if op == "open":
                talk = Talk(peer, tokenizer, hello["eos"])
                answer: Any = None
            elif op == "resident":
                answer = _restart()
            elif op == "peak":
                answer = _resident("VmHWM")
            else:
                answer = getattr(talk, op)(**request)
            print(json.dumps({"ok": answer}), file=out)
        except Exception as error:  # reported, and the caller decides
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out)


if __name__ == "__main__":
    main()
