"""What the engine expects of a generation part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.types import AttentionSpec, Needs, Pattern, Segment

__all__ = ["Generation", "PrefillLayer"]


@dataclass(frozen=True, kw_only=True)
class PrefillLayer:
    """One layer of one sequence while a prefill chunk passes through it.

    Attributes
    ----------
    layer, layers : int
        Number of this layer, and how many there are.
    q : Tensor
        ``[T, H * G, D]`` post-RoPE queries of the chunk.
    query_positions : Tensor
        ``[T]`` int32 on the CPU, ascending.
    segments : tuple of Segment
        All entries of the layer in ascending position; the last segment ends with the chunk's
        own ``T`` entries.
    spec : AttentionSpec
    prompt_end : int
        Position after the prompt's last token: chunks before the last end earlier.
    backend : Backend
        What kernels that the part calls itself are to run on.
    """

    layer: int
    layers: int
    q: Tensor
    query_positions: Tensor
    segments: tuple[Segment, ...]
    spec: AttentionSpec
    prompt_end: int
    backend: Backend = "auto"


class Generation(Protocol):
    """A pattern: frozen parameters; what changes while a sequence runs is in its state."""

    @property
    def needs(self) -> Needs:
        """What the part asks of the engine."""
        ...

    @property
    def chunk_multiple(self) -> int:
        """Chunk borders must be multiples of this for chunked prefill to equal whole prefill."""
        ...

    @property
    def tail(self) -> int | None:
        """Tokens at a prompt's end whose entries depend on its ending there: no pool may have them.

        None where all of them do.
        """
        ...

    def state(self) -> Any:
        """State for one sequence; None for a part that has none."""
        ...

    def patterns(self, ctx: PrefillLayer, state: Any) -> tuple[Pattern, ...]:
        """One pattern per segment of ``ctx``; every query row must see at least itself."""
        ...
