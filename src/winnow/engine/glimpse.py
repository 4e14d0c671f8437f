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
    lse_TH, parts = partial.lse, []
    for segment in segments:
        of_query_NS = mass(
            q_THD, segment, spec=spec, query_positions=positions_T, lse=lse_TH, backend=backend
        )
        parts.append(of_query_NS.view(segment.heads, -1, of_query_NS.shape[1]).sum(1))
    group = q_THD.shape[1] // parts[0].shape[0]
    return _glimpse(layer, True, positions_T, segments, parts, group), pairs + partial.pairs


def decode_glimpse(
    layer: int,
    position_1: Tensor,
    segments: Sequence[Segment | EncodedSegment],
    masses: list[Tensor],
    group: int,
) -> Glimpse:
    """The mass of one decode step; ``masses`` are ``[H, S]`` per segment, as ``decode_mass`` gives them."""
    return _glimpse(layer, False, position_1, segments, masses, group)


def _glimpse(
    layer: int,
    prompt: bool,
    positions_T: Tensor,
    segments: Sequence[Segment | EncodedSegment],
    parts: list[Tensor],
    group: int,
) -> Glimpse:
    if len(segments) == 1:
        lengths = segments[0].lengths.cpu()
        mass_HS = parts[0][:, : max(lengths.tolist())]
    else:
        lengths_sH = torch.stack([segment.lengths for segment in segments]).cpu()
        lengths, mass_HS = lengths_sH.sum(0, dtype=torch.int32), _ascending(segments, parts, lengths_sH)
    return Glimpse(
        layer=layer, prompt=prompt, positions=positions_T, lengths=lengths, mass=mass_HS, group=group
    )


def _ascending(
    segments: Sequence[Segment | EncodedSegment], parts: list[Tensor], lengths_sH: Tensor
) -> Tensor:
    """``[H, S]`` of all segments as one table of every head's entries in ascending position."""
    totals_H = lengths_sH.sum(0)
    table_HS = torch.zeros(len(totals_H), int(totals_H.max()), device=parts[0].device)
    for h, total in enumerate(totals_H.tolist()):
        counts = lengths_sH[:, h].tolist()
        held = torch.cat([part[h, :n] for part, n in zip(parts, counts, strict=True)])
        at = torch.cat([segment.positions_of(h) for segment in segments])
        if bool((at.diff() < 0).any()):
            held = held[at.argsort().to(held.device)]
        table_HS[h, :total] = held
    return table_HS
