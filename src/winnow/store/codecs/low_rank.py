"""Keys as a product of two thin matrices, values as they are, a landmark for every few keys."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.decode import decode
from winnow.kernels.rebuilt_decode import Turning, is_fast, rebuilt_decode, turning
from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.protocol import Plane
from winnow.types import AttentionSpec, Partial, Segment, Selection

__all__ = ["CHUNK", "LowRank"]

CHUNK = 8
"""Entries that a landmark stands for."""


class LowRank:
    """The form of ShadowKV (arXiv 2410.21465): K at rank ``rank`` over all heads of the layer.

    The product is of the keys before rotation; each is turned to its position when it is rebuilt. The
    factors and the landmarks (means of :data:`CHUNK` keys as they were stored, after rotation) stay where
    attention runs; V may lie on a slower tier.

    Parameters
    ----------
    rank : int
        Of the keys of all heads together.
    """

    channels: int | None = None

    def __init__(self, rank: int):
        if rank < 1:
            raise ValueError(f"codec 'low-rank:{rank}' has no keys; give a rank of at least 1")
        self.key_rank: int | None = rank
        self.name = f"low-rank:{rank}"

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return (
            Plane(name="landmark", dtype=dtype, width=head_dim, entries=CHUNK, stays=True, index=True),
            Plane(name="v", dtype=dtype, width=head_dim),
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Landmarks and values; the keys themselves are in the factors."""
        return k.float().view(-1, CHUNK, k.shape[1]).mean(1).to(k.dtype), v

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys at position 0, and values."""
        _, v, left, right = rows
        return (left @ right).to(dtype), v.to(dtype)

    def attend(
        self,
        q_HD: Tensor,
        segment: EncodedSegment,
        *,
        spec: AttentionSpec,
        position: int,
        selection: Selection | None,
        want_logits: bool,
        backend: Backend,
    ) -> Partial | None:
        """Attention over keys that are rebuilt on the way, and values as they lie.

        Where the kernel cannot run, keys of listed chunks are rebuilt first; None for anything but lists of
        chunks by KV head: the caller then decodes whole pages.
        """
        assert segment.factors is not None
        stored = segment.derived("stored", _stored)
        if is_fast(q_HD, stored, segment.factors, spec, backend):
            table = segment.derived("turning", _turning)
            if table is not None:
                return rebuilt_decode(
                    q_HD,
                    stored,
                    segment.factors,
                    table,
                    spec=spec,
                    position=position,
                    selection=selection,
                    want_logits=want_logits,
                    backend=backend,
                )
        if selection is None or selection.page != CHUNK or want_logits:
            return None
        if selection.indices.shape[0] != segment.heads:
            return None
        chosen = self._gather(segment, selection)
        return decode(q_HD, chosen, spec=spec, position=position, backend=backend)

    def _gather(self, segment: EncodedSegment, selection: Selection) -> Segment:
        v, factors, H = segment.rows[1], segment.factors, segment.heads
        assert factors is not None
        heads, device = torch.arange(H, device=v.device).unsqueeze(1), v.device
        chunks_HN = selection.indices.to(device).long()
        entries_HN = (chunks_HN.unsqueeze(2) * CHUNK + torch.arange(CHUNK, device=device)).flatten(1)
        longest = int(segment.lengths.max())
        # A chunk of V is one row: its entries lie side by side.
        chunked = v[:, :longest].unflatten(1, (-1, CHUNK)).flatten(2)  # type: ignore[no-untyped-call]
        v_HND = chunked[heads, chunks_HN].view(H, -1, v.shape[2])
        if segment.positions is None:
            positions_HN = entries_HN + segment.start
        else:
            positions_HN = segment.positions[heads, entries_HN].long()
        k_HND = torch.empty_like(v_HND)
        for head, positions_N in enumerate(positions_HN):  # what one head needs stays in the cache
            left_Nr = factors.left.index_select(0, positions_N - factors.start)
            k_HND[head] = segment.turned(left_Nr @ factors.right[head], positions_N)
        return Segment(
            k=k_HND,
            v=v_HND,
            lengths=selection.counts.cpu() * CHUNK,
            positions=positions_HN.int(),
            bias=None if segment.bias is None else segment.bias[heads, entries_HN],
            tier=segment.tier,
            version=segment.version,
        )


def _stored(segment: EncodedSegment) -> Segment:
    """Values, lengths and positions; nobody reads its keys."""
    v = segment.rows[1]
    return segment.seen_as(v, v)


def _turning(segment: EncodedSegment) -> Turning | None:
    factors = segment.factors
    assert factors is not None
    last = factors.start + len(factors.left)
    return turning(factors.rotary, segment.head_dim, factors.start, last)
