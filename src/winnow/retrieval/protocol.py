"""What the engine expects of a retrieval part (a pool)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from torch import Tensor

from winnow.store.codecs import EncodedSegment
from winnow.store.sequence import SequenceStore
from winnow.types import Needs, Segment

__all__ = [
    "Bounded",
    "Chunk",
    "ChunkPart",
    "ChunkPool",
    "Match",
    "Pool",
    "PoolPart",
    "PrefixPart",
    "reuses_chunks",
    "reuses_prefixes",
]


@dataclass(frozen=True, kw_only=True)
class Match:
    """Reusable entries found in a pool.

    Attributes
    ----------
    length : int
        Tokens covered, from position 0; 0 where nothing matched.
    layers : tuple of tuple of Segment
        Per layer the read-only segments that hold them, in ascending position.
    handle : object
        Give it back through :meth:`Pool.release`; until then the entries stay in memory.
    """

    length: int
    layers: tuple[tuple[Segment | EncodedSegment, ...], ...]
    handle: Any


class Bounded(Protocol):
    """Reusable entries in memory, of which somebody else says how much there may be."""

    def bytes(self) -> int:
        """Bytes that the pool holds, measured from its live allocations."""
        ...

    def resize(self, capacity_bytes: int) -> None:
        """Set the most memory that the pool may hold; what exceeds it and is not in use goes now."""
        ...

    def clear(self) -> None:
        """Forget everything that is not in use."""
        ...


class Pool(Bounded, Protocol):
    """A living pool; one per engine. Exact and approximate entries never share a name space."""

    def match(self, tokens: Sequence[int], namespace: str) -> Match:
        """Longest reusable prefix of ``tokens``, never all of them: one token must be computed."""
        ...

    def release(self, match: Match) -> None:
        """Allow the entries of a match to be evicted again."""
        ...

    def insert(
        self,
        tokens: Sequence[int],
        namespace: str,
        layers: Sequence[Sequence[Segment | EncodedSegment]],
        codec: str = "raw",
    ) -> int:
        """Copy the entries of ``tokens`` into the pool; return how many tokens were new.

        All entries of a name space are in one codec.
        """
        ...

    def bytes_on_disk(self) -> int:
        """Bytes of its files; 0 where it keeps none."""
        ...


@dataclass(eq=False, kw_only=True)
class Chunk:
    """Entries of a piece of text that were computed behind nothing but a begin token.

    Attributes
    ----------
    tokens : int
    start : int
        Position at which its first entry was computed: the number of begin tokens.
    store : SequenceStore
        Holds them, at positions ``start .. start + tokens - 1``, in every layer and head.
    bytes : int
        What the store holds, measured; it does not change any more.
    users : int
        Requests that read it now.
    """

    tokens: int
    start: int
    store: SequenceStore
    bytes: int
    users: int = 0


class ChunkPool(Bounded, Protocol):
    """A living pool of chunks, found by their token ids; one per engine.

    What it holds is approximate wherever it is placed behind other text, so it shares nothing with
    a pool of exact prefixes.
    """

    def has(self, tokens: Sequence[int], begin: Sequence[int], namespace: str) -> bool:
        """Whether :meth:`find` would find a chunk, which now counts as used last."""
        ...

    def find(self, tokens: Sequence[int], begin: Sequence[int], namespace: str) -> Chunk | None:
        """The chunk of exactly these tokens, computed behind ``begin``; it stays until released."""
        ...

    def keep(
        self, tokens: Sequence[int], begin: Sequence[int], namespace: str, store: SequenceStore
    ) -> Chunk:
        """Take over a store that holds ``begin`` and then ``tokens``; the chunk stays until released."""
        ...

    def release(self, chunk: Chunk) -> None:
        """Allow a chunk to be evicted again; once for every chunk that was handed out."""
        ...


class PoolPart(Protocol):
    """The frozen parameters of a pool."""

    def pool(self) -> Pool | ChunkPool:
        """An empty pool."""
        ...


class PrefixPart(Protocol):
    """A pool of prefixes, exact unless a codec rounds them."""

    @property
    def codec(self) -> str:
        """Form in which the pool holds entries; ``raw`` is exact."""
        ...

    def pool(self) -> Pool:
        """An empty pool."""
        ...


class ChunkPart(Protocol):
    """A pool of chunks, and which of their tokens are computed again where they are placed."""

    @property
    def needs(self) -> Needs:
        """What the part asks of the engine."""
        ...

    @property
    def separator(self) -> str | None:
        """Text that divides a prompt into chunks; None where the user gives them."""
        ...

    @property
    def codec(self) -> str:
        """Form in which the pool stores whole pages of a chunk."""
        ...

    @property
    def capacity_bytes(self) -> int:
        """Most memory that the pool may hold."""
        ...

    @property
    def repairs(self) -> bool:
        """Whether any token is computed again."""
        ...

    def pool(self) -> ChunkPool:
        """An empty pool."""
        ...

    def check(self, layers: int) -> None:
        """Raise ``ValueError``, with a remedy, where a model of so many layers cannot be served."""
        ...

    def chooses(self, layer: int) -> bool:
        """Whether fewer tokens leave this layer than entered it."""
        ...

    def choose(self, layer: int, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], of: int) -> Tensor:
        """Which of the tokens that entered a layer are computed further.

        Parameters
        ----------
        layer : int
        new, old : tuple of Tensor
            Keys and values ``[N, H, D]`` of those tokens as computed now, and as stored, turned to the
            same positions.
        of : int
            Tokens of all chunks together.

        Returns
        -------
        Tensor
            ``[n]`` int64 rows, ascending.
        """
        ...


def reuses_chunks(part: PoolPart) -> TypeGuard[ChunkPart]:
    """Whether a retrieval part reuses chunks, to be repaired, instead of exact prefixes."""
    return hasattr(part, "choose")


def reuses_prefixes(part: PoolPart) -> TypeGuard[PrefixPart]:
    """Whether a retrieval part reuses prefixes."""
    return not hasattr(part, "choose")
