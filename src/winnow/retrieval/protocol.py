"""What the engine expects of a retrieval part (a pool)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from winnow.store.codecs import EncodedSegment
from winnow.types import Segment

__all__ = ["Match", "Pool", "PoolPart"]


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
    layers: tuple[tuple[Segment, ...], ...]
    handle: Any


class Pool(Protocol):
    """A living pool; one per engine. Exact and approximate entries never share a name space."""

    def match(self, tokens: Sequence[int], namespace: str) -> Match:
        """Longest reusable prefix of ``tokens``, never all of them: one token must be computed."""
        ...

    def release(self, match: Match) -> None:
        """Allow the entries of a match to be evicted again."""
        ...

    def insert(
        self, tokens: Sequence[int], namespace: str, layers: Sequence[Sequence[Segment | EncodedSegment]]
    ) -> int:
        """Copy the entries of ``tokens`` into the pool; return how many tokens were new."""
        ...

    def bytes(self) -> int:
        """Bytes that the pool holds, measured from its live allocations."""
        ...


class PoolPart(Protocol):
    """The frozen parameters of a pool."""

    def pool(self) -> Pool:
        """An empty pool."""
        ...
