"""A prompt in chunks, as a user gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Chunks", "split"]


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
