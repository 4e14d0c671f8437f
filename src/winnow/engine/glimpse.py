"""Attention mass, for the parts that asked for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.dense import dense
from winnow.kernels.mass import mass
from winnow.store.codecs import EncodedSegment
from winnow.types import AttentionSpec, Glimpse, Partial, Segment

__all__ = ["decode_glimpse", "prefill_glimpse"]


def prefill_glimpse(
    layer: int,
    q_THD: Tensor,
    positions_T: Tensor,
    segments: Sequence[Segment],
    spec: AttentionSpec,
    partial: Partial | None,
    backend: Backend,
) -> tuple[Glimpse, int]:
    """The mass of a chunk of queries on every entry, under dense attention.

    Parameters
    ----------
    partial : Partial or None
        The chunk's own attention, sinks included, where it was dense. None where a pattern left
        scores out: the sums that probabilities are divided by are then computed here.

    Returns
    -------
    Glimpse
    int
        Score entries that this took.
    """
    pairs = 0
    if partial is None:
        partial = dense(q_THD, segments, spec=spec, query_positions=positions_T, backend=backend)
        pairs = partial.pairs
    parts = [
        mass(q_THD, segment, spec=spec, query_positions=positions_T, lse=partial.lse, backend=backend)
        for segment in segments
    ]
    return _glimpse(layer, True, positions_T, segments, parts), pairs + partial.pairs


def decode_glimpse(
    layer: int,
    position: int,
    segments: Sequence[Segment | EncodedSegment],
    logits: Sequence[Tensor],
    partial: Partial,
) -> Glimpse:
    """The mass of one decode step; ``logits`` are ``[H * G, S]`` per segment, ``-inf`` where not read.

    The logits become the mass in place: they are megabytes per layer, and nobody reads them afterwards.
    """
    parts = [one.sub_(partial.lse[0, :, None]).exp_() for one in logits]
    return _glimpse(layer, False, torch.tensor([position], dtype=torch.int32), segments, parts)


def _glimpse(
    layer: int,
    prompt: bool,
    positions_T: Tensor,
    segments: Sequence[Segment | EncodedSegment],
    parts: list[Tensor],
) -> Glimpse:
    lengths_sH = torch.stack([segment.lengths for segment in segments]).cpu()
    return Glimpse(
        layer=layer,
        prompt=prompt,
        positions=positions_T,
        lengths=lengths_sH.sum(0, dtype=torch.int32),
        mass=_ascending(segments, parts, lengths_sH),
    )


def _ascending(
    segments: Sequence[Segment | EncodedSegment], parts: list[Tensor], lengths_sH: Tensor
) -> Tensor:
    """Columns of all segments as one table of every head's entries in ascending position."""
    if len(parts) == 1:
        return parts[0][:, : int(lengths_sH.max())]
    heads, group = lengths_sH.shape[1], parts[0].shape[0] // lengths_sH.shape[1]
    table = torch.zeros(parts[0].shape[0], int(lengths_sH.sum(0).max()), device=parts[0].device)
    for h in range(heads):
        counts = lengths_sH[:, h].tolist()
        rows = slice(h * group, (h + 1) * group)
        held = torch.cat([part[rows, :n] for part, n in zip(parts, counts, strict=True)], 1)
        at = torch.cat([segment.positions_of(h) for segment in segments])
        if bool((at.diff() < 0).any()):
            held = held[:, at.argsort().to(held.device)]
        table[rows, : held.shape[1]] = held
    return table
