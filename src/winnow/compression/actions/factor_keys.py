"""Old keys become a product of two thin matrices; their values may go to a slower tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from winnow._check import integer
from winnow.compression.actions.drop import kept
from winnow.compression.protocol import Plain, Stored
from winnow.store.codecs import ENTRIES
from winnow.store.codecs.low_rank import CHUNK
from winnow.types import Budget, Demotion, Factors, Needs, Observation, Plan, Scores, Tier

__all__ = ["FactorKeys", "Factored", "factorised"]

_ROWS = 4096  # tokens that are squared at a time, so that no second copy of all keys is made


def factorised(k_NHD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank ``rank`` to the keys of all heads, as two factors.

    The right factor has the leading right singular vectors as rows, found as eigenvectors of the Gram
    matrix in float64; the left one is the keys times its transpose, so singular values are in it.

    Parameters
    ----------
    k_NHD : Tensor
        ``[N, H, D]`` float32 keys before rotation.
    rank : int
        At most ``H * D``.

    Returns
    -------
    left : Tensor
        ``[N, rank]`` float32.
    right : Tensor
        ``[H, rank, D]`` float32.
    """
    _, H, D = k_NHD.shape
    flat = k_NHD.flatten(1)
    gram = torch.zeros(H * D, H * D, dtype=torch.float64, device=flat.device)
    for block in torch.split(flat, _ROWS):
        wide = block.double()
        gram.addmm_(wide.T, wide)
    basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).float()
    return flat @ basis, basis.T.reshape(rank, H, D).transpose(0, 1).contiguous()


@dataclass
class Factored:
    """Per layer and head, the position below which every entry was judged."""

    end: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FactorKeys(Plain):
    """Drop what does not fit the budget, then store the keys of old chunks at low rank.

    Of the entries that were not judged yet, all but the newest ``local`` chunks are cut into chunks of
    :data:`~winnow.store.codecs.low_rank.CHUNK`. In every head the ``outliers`` chunks whose mean
    represents them worst (lowest cosine between one of their keys and it) stay as they are; the others go
    to the codec ``low-rank``: keys of all heads, turned back to position 0, as one product of rank
    ``rank``. Chunks that fill no page of the store stay local. A stretch of no more than ``rank`` tokens
    stays as it is, since a product would be no smaller.

    Source: ShadowKV (arXiv 2410.21465), ``models/kv_cache.py``.

    Attributes
    ----------
    rank : int
        Of the keys of a layer, all heads together; at most their ``H * D`` is taken.
    outliers : int
        Chunks per head that stay as they are.
    local : int
        Newest chunks that stay as they are, at least 0.
    tier : {"host", "disk"} or None
        Where the values of the demoted entries go; None leaves them where they are.
    """

    rank: int = 160
    outliers: int = 48
    local: int = 4
    tier: Tier | None = "disk"

    def __post_init__(self) -> None:
        integer("factor-keys", "rank", self.rank, 1, "dimensions")
        integer("factor-keys", "outliers", self.outliers, 0, "chunks")
        integer("factor-keys", "local", self.local, 0, "chunks")
        if self.tier not in (None, "host", "disk"):
            raise ValueError(f"factor-keys: tier={self.tier!r} is no slower tier; give 'host' or 'disk'")

    @property
    def needs(self) -> Needs:
        """Keys are turned back to position 0."""
        return Needs(rotary=True)

    def state(self) -> Factored:
        """What was judged so far."""
        return Factored()

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: Factored) -> Plan:
        """Turn scores and a budget into a plan for one layer."""
        segment, keep = seen.segment, kept(scores, budget)
        end = state.end.setdefault(seen.layer, [0] * segment.heads)
        lists, ends = [], []
        for head, n in enumerate(scores.lengths.tolist()):
            stays = torch.arange(n) if keep is None else keep[head]
            where = segment.positions_of(head).cpu()[stays]
            fresh = stays[where >= end[head]]
            old = self._old(fresh)
            lists.append(self._represented(segment.k[head], old))
            ends.append(int(segment.positions_of(head)[int(old[-1])]) + 1 if len(old) else end[head])
        spans = [segment.positions_of(h).cpu()[one] for h, one in enumerate(lists) if len(one)]
        first = min((int(span[0]) for span in spans), default=0)
        last = max((int(span[-1]) + 1 for span in spans), default=0)
        rank = min(self.rank, segment.heads * segment.k.shape[2])
        if last - first <= rank:
            return Plan(keep=keep)
        state.end[seen.layer] = ends
        left, right = factorised(_unturned(seen, first, last), rank)
        dtype = segment.k.dtype
        factors = Factors(left=left.to(dtype), right=right.to(dtype), start=first, rotary=seen.rotary)
        demotion = Demotion(entries=tuple(lists), codec=f"low-rank:{rank}", tier=self.tier, factors=factors)
        return Plan(keep=keep, demote=(demotion,))

    def truncated(self, layer: int, left: Sequence[Stored], tokens: int, state: Factored) -> None:
        """What comes in the place of judged entries is judged anew."""
        if layer in state.end:
            state.end[layer] = [min(end, tokens) for end in state.end[layer]]

    def _old(self, fresh: Tensor) -> Tensor:
        """Entries of whole chunks that leave whole pages once the outliers are taken out."""
        chunks = len(fresh) // CHUNK - self.local
        chunks -= (chunks - self.outliers) % (ENTRIES // CHUNK)
        return fresh[: chunks * CHUNK] if chunks > self.outliers else fresh[:0]

    def _represented(self, k_SD: Tensor, old: Tensor) -> Tensor:
        """The entries of all chunks but the ``outliers`` that their mean represents worst."""
        if len(old) == 0 or self.outliers == 0:
            return old
        chunked = k_SD[old.to(k_SD.device)].float().unflatten(0, (-1, CHUNK))  # type: ignore[no-untyped-call]
        alike = functional.cosine_similarity(chunked, chunked.mean(1, keepdim=True), dim=-1).amin(1)
        order = alike.sort(stable=True).indices.cpu()
        return old.view(-1, CHUNK)[order[self.outliers :].sort().values].flatten()


def _unturned(seen: Observation, first: int, last: int) -> Tensor:
    """``[n, H, D]`` float32 keys at positions ``first .. last - 1``, turned back; zero where none is."""
    segment, rotary = seen.segment, seen.rotary
    begin, end = first - segment.start, last - segment.start
    if segment.positions is None and int(segment.lengths.min()) >= end:
        k_HnD = segment.k[:, begin:end].float()
        if rotary is not None:
            k_HnD = rotary.turn(k_HnD, -torch.arange(first, last, device=k_HnD.device))
        return k_HnD.transpose(0, 1)
    size, device = segment.k.shape[2], segment.k.device
    k_nHD = torch.zeros(last - first, segment.heads, size, device=device)
    for head in range(segment.heads):
        positions = segment.positions_of(head).to(device).long()
        inside = (positions >= first) & (positions < last)
        at = positions[inside]
        k_mD = segment.k[head, : len(positions)][inside].float()
        k_nHD[at - first, head] = k_mD if rotary is None else rotary.turn(k_mD, -at)
    return k_nHD
