"""Answers that follow a JSON schema: xgrammar says which tokens may come next.

The mask is part of the drawing, not a filter on the result, so every finished answer parses. An answer
that ``max_tokens`` cuts off is incomplete, as ``finish_reason`` says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import xgrammar
from torch import Tensor

from winnow.engine.steer import Steer
from winnow.models.text import Text
from winnow.serve.errors import ApiError

__all__ = ["Grammars"]

# Of schemas compiled before; a client that sends ever new ones cannot fill the memory.
_CACHE_BYTES = 64 << 20
_LONGEST_SCHEMA = 64 << 10
_DEEPEST_SCHEMA = 100  # compiling takes time that grows with a power of the depth


class _Follow:
    """Masks the logits of one sample to what a grammar allows."""

    def __init__(self, grammar: xgrammar.CompiledGrammar, vocab_size: int, ends: Sequence[int]) -> None:
        self._ends = list(ends)
        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._mask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._seen = 0

    def __call__(self, logits_V: Tensor, drawn: Sequence[int]) -> Tensor:
        for token in drawn[self._seen :]:
            accepted = self._matcher.accept_token(token)
            assert accepted, "a token was drawn that the grammar does not allow"
        self._seen = len(drawn)
        if not self._matcher.fill_next_token_bitmask(self._mask):
            return logits_V
        # On the CPU whatever the device: drawing happens there, and the mask is small.
        masked_1V = logits_V.detach().to("cpu", torch.float32, copy=True)[None]
        if self._mask.any():
            xgrammar.apply_token_bitmask_inplace(masked_1V, self._mask)
            return masked_1V[0]
        # The form has led into a dead end (a schema can demand what is infinite): the answer ends here.
        ended_V = torch.full_like(masked_1V[0], -torch.inf)
        ended_V[self._ends] = 0.0
        return ended_V

    @property
    def can_begin(self) -> bool:
        """Whether any token may come first."""
        return not self._matcher.fill_next_token_bitmask(self._mask) or bool(self._mask.any())


class Grammars:
    """Compiles schemas for one model; any thread may use it.

    Parameters
    ----------
    text : Text
    vocab_size : int
        Columns of the model's logits.
    eos_token_ids : sequence of int
        Tokens that may end an answer.

    Raises
    ------
    ValueError
        Where the model has no end token, so that no answer could end.
    """

    def __init__(self, text: Text, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if not eos_token_ids:
            raise ValueError("this model has no end-of-sequence token; a constrained answer could never end")
        info = xgrammar.TokenizerInfo.from_huggingface(
            text.tokenizer, vocab_size=vocab_size, stop_token_ids=list(eos_token_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)
        self._vocab_size = vocab_size
        self._ends = eos_token_ids
        self._lock = threading.Lock()

    def json_object(self) -> Callable[[], Steer]:
        """Any JSON object."""
        return self._maker({"type": "object"}, "response_format")

    def json_schema(self, schema: dict[str, Any], param: str) -> Callable[[], Steer]:
        """JSON that a schema describes; the fields of an object come in the schema's order.

        Raises
        ------
        ApiError
            400 where the schema is none, or uses what cannot be enforced; names ``param``.
        """
        return self._maker(schema, param)

    def _maker(self, schema: dict[str, Any], param: str) -> Callable[[], Steer]:
        text = json.dumps(schema)
        if len(text) > _LONGEST_SCHEMA:
            raise ApiError(400, f"the schema is longer than {_LONGEST_SCHEMA} characters", param=param)
        if _depth(schema) > _DEEPEST_SCHEMA:
            raise ApiError(400, f"the schema is nested more than {_DEEPEST_SCHEMA} deep", param=param)
        try:
            with self._lock:
                # Only the whitespace that a compact writer sets: a small model could go on
                # indenting for ever. Without "strict" a schema leaves additional properties open.
                grammar = self._compiler.compile_json_schema(text, any_whitespace=False, strict_mode=False)
        except (RuntimeError, ValueError) as error:
            line = next((one for one in str(error).splitlines() if one.strip()), "unknown reason")
            raise ApiError(
                400, f"the schema cannot be enforced ({line.strip()}); simplify it", param=param
            ) from error

        def make() -> _Follow:
            return _Follow(grammar, self._vocab_size, self._ends)

        if not make().can_begin:
            raise ApiError(400, "the schema allows no answer; what refers to itself must end", param=param)
        return make


def _depth(schema: Any) -> int:
    """Objects and lists that lie in one another."""
    depth, level = 0, [schema]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth
