"""Keys without their least useful channels, in the model's own type; decoding reads them as they lie."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.decode import decode
from winnow.kernels.merge import merge
from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.protocol import ENTRIES, Decoded, Plane
from winnow.types import AttentionSpec, Partial, Segment, Selection

__all__ = ["Thin"]


class Thin(Decoded):
    """``channels`` channels of K, all of V, unrounded (the form of ThinK, arXiv 2407.21018).

    One row holds an entry's remaining key channels and behind them its value. Read from its beginning
    as ``D`` values, the row is the key followed by the first channels of the same entry's value, and a
    query that is zero there leaves only the key: so the ordinary kernel attends over the rows as they
    lie, and a row's bytes come from memory once. Keys are filled up with zeros to a multiple of eight
    channels, so that values are aligned. A page knows its channels.

    Parameters
    ----------
    channels : int
        Channels of K that are stored, at least 1.
    """

    def __init__(self, channels: int):
        if channels < 1:
            raise ValueError("codec 'thin:0' keeps no channel; give at least 'thin:1'")
        self.channels: int | None = channels
        self.name = f"thin:{channels}"
        self._kept = channels
        self._slot = -(-channels // 8) * 8

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        if self._kept > head_dim or head_dim > 256:
            raise ValueError(
                f"codec {self.name!r}: a head has {head_dim} channels; keep no more, of at most 256"
            )
        return (
            Plane(name="kv", dtype=dtype, width=self._slot + head_dim),
            Plane(name="channels", dtype=torch.uint8, width=self._kept, entries=ENTRIES),
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Rows of one head; without a list, each page keeps its channels of the largest norm.

        Keys that were decoded are zero in the channels they lost, so they keep what they have.
        """
        pages = k.shape[0] // ENTRIES
        if channels is not None:
            channels = channels.to(k.device)
            thin, channels_PC = k.index_select(1, channels), channels.expand(pages, -1)
        else:
            energy_PD = k.float().view(pages, ENTRIES, -1).square().sum(1)
            order_PD = energy_PD.sort(dim=1, descending=True, stable=True).indices
            channels_PC = order_PD[:, : self._kept].sort(1).values
            thin = k.gather(1, channels_PC.repeat_interleave(ENTRIES, 0))
        filler = k.new_zeros(k.shape[0], self._slot - self._kept)
        return torch.cat([thin, filler, v], 1), channels_PC.to(torch.uint8)

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kv, channels = rows
        v = kv[..., self._slot :]
        k = torch.zeros_like(v, memory_format=torch.contiguous_format)
        at = channels.long().repeat_interleave(ENTRIES, -2)
        return k.scatter_(-1, at, kv[..., : self._kept]).to(dtype), v.to(dtype)

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
        """Attention over the rows as they lie; the scale stays that of all ``D`` channels.

        None for a list of entries of pages that do not share their channels.
        """
        stretches = segment.derived("stretches", self._stretches)
        if selection is not None and len(stretches) > 1:
            return None
        q_HGD = q_HD.view(segment.heads, -1, segment.head_dim)
        partials = []
        for raw, at_HGD, kept_HGD in stretches:
            thin_HGD = q_HGD.gather(2, at_HGD.expand_as(q_HGD)) * kept_HGD
            partials.append(
                decode(
                    thin_HGD.flatten(0, 1),
                    raw,
                    spec=spec,
                    position=position,
                    selection=selection,
                    want_logits=want_logits,
                    backend=backend,
                )
            )
        if len(partials) == 1:
            return partials[0]
        whole = merge(partials)
        logits = [p.logits for p in partials if p.logits is not None]
        return Partial(
            out=whole.out, lse=whole.lse, pairs=whole.pairs, logits=torch.cat(logits, 1) if logits else None
        )

    def _stretches(self, segment: EncodedSegment) -> list[tuple[Segment, Tensor, Tensor]]:
        """Entries between changes of any head's channels: rows as keys and values, and channels.

        Per stretch ``[H, 1, D]`` the channel of the query that each of the row's first ``D`` values
        meets, and 1 where it meets any, else 0.
        """
        found = []
        H, D = segment.heads, segment.head_dim
        bounds = self._bounds(segment)
        for first, last in pairwise(bounds):
            part = segment if len(bounds) == 2 else segment.narrow(first, last)
            kv, channels = part.rows
            at_HGD = torch.zeros(H, 1, D, dtype=torch.int64, device=kv.device)
            at_HGD[..., : self._kept] = channels[:, :1]
            raw = part.seen_as(kv[..., :D], kv[..., self._slot :])
            kept_HGD = (torch.arange(D, device=kv.device) < self._kept).to(segment.dtype).expand(H, 1, D)
            found.append((raw, at_HGD, kept_HGD))
        return found

    @staticmethod
    def _bounds(segment: EncodedSegment) -> list[int]:
        """Entries at which the channels of some head change, with 0 and the end."""
        channels, longest = segment.rows[1], int(segment.lengths.max())
        pages_H = (segment.lengths // ENTRIES).to(channels.device)
        pages = longest // ENTRIES
        changes_HP = (channels[:, 1:pages] != channels[:, : max(0, pages - 1)]).any(-1)
        # What lies behind the end of a shorter head is reserved, not valid.
        changes_HP &= torch.arange(1, pages, device=channels.device) < pages_H.unsqueeze(1)
        at: list[int] = changes_HP.any(0).nonzero().flatten().tolist()
        return [0, *((page + 1) * ENTRIES for page in at), longest]
