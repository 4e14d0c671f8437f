"""A prompt in chunks, as a user gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from winnow.engine.repair import Division

__all__ = ["Chunks", "Words", "divide", "split"]


class Words(Protocol):
    """What makes tokens of a text."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what stands around a whole text."""
        ...


@dataclass(frozen=True)
class Chunks:
    """A prompt in pieces: the last is computed, the others may be reused wherever they stand.

    Pieces are joined as they are; each is made into tokens by itself, so that a chunk has the same
    tokens in every prompt. Under a recipe that reuses no chunks this is an ordinary prompt.

    Attributes
    ----------
    pieces : sequence of (str or sequence of int)
        Texts or token ids, at least two; the last is the question, instruction or whatever else
        changes from prompt to prompt.
    """

    pieces: Sequence[str | Sequence[int]]

    def __post_init__(self) -> None:
        if isinstance(self.pieces, str) or len(self.pieces) < 2:
            raise ValueError("Chunks takes a list of at least two pieces: chunks, and what follows them")
        if not all(len(piece) for piece in self.pieces):
            raise ValueError("Chunks has an empty piece; leave it out")


def split(text: str, separator: str) -> Chunks | str:
    """A text in chunks that each end with ``separator``; as it is where that does not occur inside it."""
    parts = text.split(separator)
    pieces = [part + separator for part in parts[:-1]] + [part for part in parts[-1:] if part]
    return Chunks(pieces) if len(pieces) > 1 else text


def divide(prompt: Chunks, words: Words | None, *, special: bool = True) -> tuple[list[int], Division]:
    """Token ids of a prompt in chunks, and where they divide.

    Parameters
    ----------
    prompt : Chunks
    words : Words or None
        None takes pieces of token ids only.
    special : bool
        Put a begin token before a prompt that begins with text.

    Raises
    ------
    ValueError
        A piece is text and there is nothing that makes tokens of it.
    """

    def tokens(piece: str | Sequence[int]) -> list[int]:
        if not isinstance(piece, str):
            return [int(t) for t in piece]
        if words is None:
            raise ValueError("this model came without a tokenizer; give token ids instead of text")
        return words.encode(piece, special=False)

    pieces = [tokens(piece) for piece in prompt.pieces]
    begin = _begin(words)
    if special and isinstance(prompt.pieces[0], str):
        pieces[0] = begin + pieces[0]
    alike = pieces[0][: len(begin)] == begin
    lengths = tuple(len(piece) for piece in pieces[:-1])
    return list(chain.from_iterable(pieces)), Division(lengths=lengths, begin=tuple(begin) if alike else ())


def _begin(words: Words | None) -> list[int]:
    """What the tokenizer puts before a text."""
    if words is None:
        return []
    plain, whole = (words.encode("a", special=special) for special in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])
