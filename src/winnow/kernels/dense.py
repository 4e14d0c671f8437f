"""Dense causal attention over all segments of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.merge import add_sinks, merge
from winnow.kernels.prefill import prefill
from winnow.types import AttentionSpec, Partial, Segment

__all__ = ["Stored", "dense"]


class Stored(Protocol):
    """Entries in any form that can be decoded."""

    def decode(self) -> Segment:
        """All of them, as the model computed them."""
        ...


def dense(
    q_THD: Tensor,
    segments: Sequence[Stored],
    *,
    spec: AttentionSpec,
    query_positions: Tensor,
    backend: Backend = "auto",
) -> Partial:
    """Attention of ``T`` queries over every entry that they may see, the model's own sinks included.

    Parameters
    ----------
    q_THD : Tensor
        ``[T, H * G, D]`` post-RoPE queries.
    segments : sequence of segments
        At least one; encoded ones are decoded.
    spec : AttentionSpec
    query_positions : Tensor
        ``[T]`` int32 on the CPU, ascending.
    backend : Backend
    """
    partial = merge(
        [
            prefill(q_THD, one.decode(), spec=spec, query_positions=query_positions, backend=backend)
            for one in segments
        ]
    )
    return partial if spec.sinks is None else add_sinks(partial, spec.sinks)
