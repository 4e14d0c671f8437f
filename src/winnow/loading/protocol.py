"""What the engine expects of a loading part (a selector)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.store.codecs import EncodedSegment
from winnow.types import AttentionSpec, Needs, Segment, View

__all__ = ["DecodeLayer", "Selector"]


@dataclass(frozen=True, kw_only=True)
class DecodeLayer:
    """One layer of one sequence while a decode step passes through it.

    Attributes
    ----------
    layer, layers : int
        Number of this layer, and how many there are.
    q : Tensor
        ``[H * G, D]`` post-RoPE queries.
    position : int
        Position of the query.
    segments : tuple of (Segment or EncodedSegment)
        All entries of the layer in ascending position; the last entry of the last segment is
        the one that this step appended.
    spec : AttentionSpec
    backend : Backend
        What kernels that the part calls itself are to run on.
    """

    layer: int
    layers: int
    q: Tensor
    position: int
    segments: tuple[Segment | EncodedSegment, ...]
    spec: AttentionSpec
    backend: Backend = "auto"


class Selector(Protocol):
    """Chooses what a decode step reads; parameters frozen, per-sequence state apart."""

    @property
    def needs(self) -> Needs:
        """What the part asks of the engine."""
        ...

    def check(self, layers: int) -> None:
        """Raise ``ValueError``, with a remedy, where a model of so many layers cannot be served."""
        ...

    def state(self) -> Any:
        """State for one sequence; it also carries what passes between layers of a step."""
        ...

    def select(self, ctx: DecodeLayer, state: Any) -> View:
        """What this layer reads in this step; the appended entry must be among it."""
        ...

    def observe(self, ctx: DecodeLayer, logits: Sequence[Tensor], state: Any) -> None:
        """Take the scaled logits, one ``[H * G, S]`` per segment, where the view wanted them."""
        ...

    def state_bytes(self, state: Any) -> int:
        """Bytes of side data held for this sequence (they count as stored)."""
        ...
