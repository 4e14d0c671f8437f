"""Permuted blocks: sort keys by importance inside segments, then read the blocks that matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from winnow._check import integer
from winnow.generation.protocol import PrefillLayer
from winnow.kernels.merge import merge
from winnow.kernels.prefill import prefill
from winnow.types import Blocks, Dense, Needs, Partial, Pattern, Segment

__all__ = ["PermutedBlocks"]


@dataclass(frozen=True, kw_only=True)
class PermutedBlocks:
    """PBS-Attn: block-sparse attention over keys that were permuted so that important ones share blocks.

    Source: PBS-Attn (arXiv 2510.21270), ``pbs_attn/src/pbs.py`` and ``permute_states.py``.

    Attention does not depend on the order of keys. Inside every complete segment of ``segment`` keys
    they are sorted by the mean attention that the last ``block`` queries give them. A query block reads
    its own segment causally and, of the permuted blocks of earlier segments, the fewest whose share of
    a softmax over pooled queries and keys reaches ``share``; the block that holds token 0 always.

    Attributes
    ----------
    block : int
        Queries and keys of a block (``B``).
    segment : int
        Keys that are permuted among themselves (``S``), a multiple of ``block``.
    share : float
        Cumulative probability that the chosen blocks reach (``tau``); 1 reads all of them.

    Notes
    -----
    Deviations from the official code:

    - One permutation per KV head, by the mean importance over its query heads. The code repeats keys
      and values to all query heads first and permutes each copy.
    - The importance of keys comes from the last queries that were computed: in a chunked prefill those
      of the chunk. The code takes no chunks.
    - A row reads at least the best block, also where rounding leaves the sum below ``share``.
    - Where entries are not consecutive (a compression dropped some) or have a bias, or the model's
      layer has a sliding window, everything is read.
    """

    block: int = 128
    segment: int = 256
    share: float = 0.9

    exempt = {  # noqa: RUF012 (read by the contract suite)
        "chunked equals whole": "importance comes from the last queries of each chunk",
    }

    def __post_init__(self) -> None:
        integer("permuted-blocks", "block", self.block, 1, "tokens")
        integer("permuted-blocks", "segment", self.segment, 1, "tokens")
        if self.segment % self.block:
            raise ValueError(
                f"permuted-blocks: segment={self.segment} is no multiple of block={self.block}; "
                f"give {-(-self.segment // self.block) * self.block}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"permuted-blocks: share={self.share} will not do; give more than 0, up to 1")

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs()

    @property
    def chunk_multiple(self) -> int:
        """Segments are counted from position 0."""
        return self.segment

    @property
    def tail(self) -> None:
        """Every token of a call depends on the last ones: none is reusable under a longer prompt."""
        return

    def state(self) -> None:
        """No state."""

    def patterns(self, ctx: PrefillLayer, state: None) -> tuple[Pattern, ...]:
        """The whole result as attention that is done; dense where the keys cannot be cut into segments."""
        whole = _consecutive(ctx.segments) if ctx.spec.window is None else None
        if whole is None or int(whole.lengths[0]) <= self.segment:
            return tuple(Pattern(form=Dense()) for _ in ctx.segments)
        rows = self._row_blocks(ctx)
        partials = [self._run(ctx, whole, self._own(ctx, rows, int(whole.lengths[0])))]
        scored = 0
        earlier = int(rows.max())
        if earlier > 0:
            order_HS, cost = self._order(ctx, whole)
            permuted = _permuted(whole, order_HS, earlier)
            mask_NRC, pooled = self._choose(ctx, permuted, order_HS[:, :earlier], rows)
            partials.append(self._run(ctx, permuted, _lists(mask_NRC, self.block)))
            scored = cost + pooled
        done = Pattern(form=None, done=merge(partials), scored=scored)
        return (*(Pattern(form=None) for _ in ctx.segments[1:]), done)

    # ------------------------------------------------------------------ which rows, which blocks

    def _row_blocks(self, ctx: PrefillLayer) -> Tensor:
        """``[R]`` first key of the segment in which each query block of this call begins."""
        starts = ctx.query_positions[:: self.block].long()
        return torch.div(starts, self.segment, rounding_mode="floor") * self.segment

    def _own(self, ctx: PrefillLayer, rows: Tensor, length: int) -> Blocks:
        """Every query block reads from the begin of its segment to itself."""
        T = ctx.q.shape[0]
        heads = ctx.q.shape[1]
        ends = torch.tensor([min((r + 1) * self.block, T) - 1 for r in range(rows.numel())])
        last = torch.div(ctx.query_positions.long()[ends], self.block, rounding_mode="floor")
        columns = -(-length // self.block)
        number = torch.arange(columns)
        first = torch.div(rows, self.block, rounding_mode="floor")
        mask_RC = (number >= first[:, None]) & (number <= last[:, None])
        return _lists(mask_RC.expand(heads, -1, -1), self.block)

    def _order(self, ctx: PrefillLayer, whole: Segment) -> tuple[Tensor, int]:
        """``[H, S]`` permuted entry numbers of the complete segments, and the products it took."""
        H, S = whole.heads, int(whole.lengths[0]) // self.segment * self.segment
        group = ctx.q.shape[1] // H
        q_BND = ctx.q[-self.block :]
        order_HS = torch.empty(H, S, dtype=torch.long, device=ctx.q.device)
        base = torch.arange(0, S, self.segment, device=ctx.q.device)[:, None]
        for h in range(H):
            q_GBD = q_BND[:, h * group : (h + 1) * group].transpose(0, 1)
            logits = (q_GBD.flatten(0, 1) @ whole.k[h, :S].T).float() * ctx.spec.scale
            if ctx.spec.softcap is not None:
                logits = ctx.spec.softcap * torch.tanh(logits / ctx.spec.softcap)
            worth_S = logits.softmax(-1).mean(0)
            inside = torch.sort(worth_S.view(-1, self.segment), dim=1, descending=True, stable=True).indices
            order_HS[h] = (inside + base).flatten()
        return order_HS, q_BND.shape[0] * ctx.q.shape[1] * S

    def _choose(
        self, ctx: PrefillLayer, permuted: Segment, order_HS: Tensor, rows: Tensor
    ) -> tuple[Tensor, int]:
        """``[N, R, C]`` bool: permuted blocks that each query block reads, and the products it took."""
        H, S = order_HS.shape
        heads, C = ctx.q.shape[1], S // self.block
        group = heads // H
        q_RND = _means(ctx.q, self.block)
        k_HCD = permuted.k.float().view(H, C, self.block, -1).mean(2)
        allowed_RC = (torch.arange(C) * self.block < rows[:, None]).to(ctx.q.device)
        mask_NRC = torch.zeros(heads, rows.numel(), C, dtype=torch.bool, device=ctx.q.device)
        # The permuted block that now holds token 0.
        sink_H = (order_HS == 0).int().argmax(1) // self.block
        for n in range(heads):
            logits_RC = q_RND[:, n] @ k_HCD[n // group].T * ctx.spec.scale
            p_RC = logits_RC.masked_fill(~allowed_RC, -torch.inf).softmax(-1).nan_to_num(0.0)
            mask_NRC[n] = allowed_RC if self.share >= 1 else _fewest(p_RC, self.share) & allowed_RC
            mask_NRC[n, :, sink_H[n // group]] |= allowed_RC.any(1)
        return mask_NRC, rows.numel() * heads * C

    @staticmethod
    def _run(ctx: PrefillLayer, segment: Segment, form: Blocks) -> Partial:
        return prefill(
            ctx.q,
            segment,
            spec=ctx.spec,
            query_positions=ctx.query_positions,
            form=form,
            backend=ctx.backend,
        )


def _consecutive(segments: tuple[Segment, ...]) -> Segment | None:
    """All entries as one segment from position 0 on; None where they are not that."""
    at = 0
    for segment in segments:
        lengths = segment.lengths.tolist()
        if segment.positions is not None or segment.bias is not None or segment.start != at:
            return None
        if min(lengths) != max(lengths):
            return None
        at += lengths[0]
    if len(segments) == 1:
        return segments[0]
    parts = [(s.k[:, : int(s.lengths[0])], s.v[:, : int(s.lengths[0])]) for s in segments]
    k, v = (torch.cat(same, 1) for same in zip(*parts, strict=True))
    return replace(segments[0], k=k, v=v, lengths=torch.full_like(segments[0].lengths, at))


def _permuted(whole: Segment, order_HS: Tensor, length: int) -> Segment:
    """A copy of the first ``length`` entries in permuted order.

    Its implicit positions are not those of the entries, but no query that reads a block of it lies
    before any of them: only rows behind a segment read that segment.
    """
    index = order_HS[:, :length, None].expand(-1, -1, whole.k.shape[2])
    lengths = torch.full_like(whole.lengths, length)
    return replace(whole, k=whole.k.gather(1, index), v=whole.v.gather(1, index), lengths=lengths)


def _means(q_TND: Tensor, block: int) -> Tensor:
    """``[R, N, D]`` float32 means of the query blocks; zeros fill the last one, as in the code."""
    rows = -(-q_TND.shape[0] // block)
    padded = functional.pad(q_TND.float(), (0, 0, 0, 0, 0, rows * block - q_TND.shape[0]))
    return padded.view(rows, block, *q_TND.shape[1:]).mean(1)


def _fewest(p_RC: Tensor, share: float) -> Tensor:
    """Per row the largest probabilities, as few as together reach ``share``."""
    best, order = p_RC.sort(1, descending=True)
    wanted = (best.cumsum(1) - best < share) & (best > 0)
    return torch.zeros_like(wanted).scatter_(1, order, wanted)


def _lists(mask_NRC: Tensor, block: int) -> Blocks:
    """The listed blocks of every row, as CSR."""
    counts = mask_NRC.sum(2)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    offsets = torch.cat([ends[:, :1] - counts[:, :1], ends], 1).int()
    return Blocks(block=block, offsets=offsets, columns=mask_NRC.nonzero()[:, 2].int())
