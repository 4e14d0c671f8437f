"""Permuted blocks: sort keys by importance inside segments, then read the blocks that matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from winnow._check import integer
from winnow.generation.protocol import PrefillLayer
from winnow.kernels.mass import mass
from winnow.kernels.prefill import prefill
from winnow.types import Blocks, Dense, Needs, Pattern, Segment

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
        rows_R = self._row_blocks(ctx)
        mask_NRC, scored = self._own(ctx, rows_R, int(whole.lengths[0])), 0
        if int(rows_R.max()) > 0:
            order_HS, cost = self._order(ctx, whole)
            order_HS = order_HS[:, : int(rows_R.max())]
            whole = _permuted(whole, order_HS, int(rows_R.min()))
            chosen_NRC, pooled = self._choose(ctx, whole, order_HS, rows_R)
            mask_NRC = torch.cat([chosen_NRC, mask_NRC], 2)
            scored = cost + pooled
        partial = prefill(
            ctx.q,
            whole,
            spec=ctx.spec,
            query_positions=ctx.query_positions,
            form=_lists(mask_NRC, self.block),
            backend=ctx.backend,
        )
        done = Pattern(form=None, done=partial, scored=scored)
        return (*(Pattern(form=None) for _ in ctx.segments[1:]), done)

    # ------------------------------------------------------------------ which rows, which blocks

    def _row_blocks(self, ctx: PrefillLayer) -> Tensor:
        """``[R]`` first key of the segment in which each query block of this call begins."""
        starts = ctx.query_positions[:: self.block].long()
        return torch.div(starts, self.segment, rounding_mode="floor") * self.segment

    def _own(self, ctx: PrefillLayer, rows_R: Tensor, length: int) -> Tensor:
        """``[N, R, C]`` bool: every query block reads from the begin of its segment to itself.

        Columns begin with the first segment that some query block lies in.
        """
        T, heads = ctx.q.shape[:2]
        ends_R = ((torch.arange(rows_R.numel()) + 1) * self.block).clamp(max=T) - 1
        number_C = torch.arange(int(rows_R.min()) // self.block, -(-length // self.block))
        first_R = torch.div(rows_R, self.block, rounding_mode="floor")
        last_R = torch.div(ctx.query_positions.long()[ends_R], self.block, rounding_mode="floor")
        mask_RC = (number_C >= first_R[:, None]) & (number_C <= last_R[:, None])
        return mask_RC.to(ctx.q.device).expand(heads, -1, -1)

    def _order(self, ctx: PrefillLayer, whole: Segment) -> tuple[Tensor, int]:
        """``[H, S]`` permuted entry numbers of the complete segments, and the products it took."""
        H, S = whole.heads, int(whole.lengths[0]) // self.segment * self.segment
        q_BND = ctx.q[-self.block :]
        complete = replace(whole, lengths=torch.full_like(whole.lengths, S))
        # Importance has no mask: all of the last queries look from the end.
        end_B = torch.full((q_BND.shape[0],), S, dtype=torch.int32)
        partial = prefill(q_BND, complete, spec=ctx.spec, query_positions=end_B, backend=ctx.backend)
        worth_NS = mass(
            q_BND, complete, spec=ctx.spec, query_positions=end_B, lse=partial.lse, backend=ctx.backend
        )
        worth_HCS = worth_NS.view(H, -1, S).sum(1).view(H, -1, self.segment)
        inside_HCS = torch.sort(worth_HCS, dim=2, descending=True, stable=True).indices
        base_C = torch.arange(0, S, self.segment, device=ctx.q.device)
        # The kernels of the sum and of the mass compute every product once each.
        return (inside_HCS + base_C[:, None]).view(H, S), 2 * partial.pairs

    def _choose(
        self, ctx: PrefillLayer, permuted: Segment, order_HS: Tensor, rows_R: Tensor
    ) -> tuple[Tensor, int]:
        """``[N, R, C]`` bool: permuted blocks that each query block reads, and the products it took."""
        H, S = order_HS.shape
        N, R, C = ctx.q.shape[1], rows_R.numel(), S // self.block
        q_HQD = _means(ctx.q, self.block).transpose(0, 1).reshape(H, -1, ctx.q.shape[2])
        k_HCD = permuted.k[:, :S].view(H, C, self.block, -1).mean(2, dtype=torch.float32)
        logits_NRC = (q_HQD @ k_HCD.transpose(1, 2)).view(N, R, C) * ctx.spec.scale
        allowed_RC = (torch.arange(C) * self.block < rows_R[:, None]).to(ctx.q.device)
        p_NRC = logits_NRC.masked_fill(~allowed_RC, -torch.inf).softmax(-1).nan_to_num(0.0)
        mask_NRC = _fewest(p_NRC, self.share) if self.share < 1 else torch.ones_like(p_NRC, dtype=torch.bool)
        # The permuted block that now holds token 0; it stayed in its segment.
        sink_H = (order_HS[:, : self.segment] == 0).int().argmax(1) // self.block
        sink_NC = functional.one_hot(sink_H.repeat_interleave(N // H), C).bool()
        return (mask_NRC | sink_NC[:, None]) & allowed_RC, R * N * C


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


def _permuted(whole: Segment, order_HS: Tensor, own: int) -> Segment:
    """A copy of the entries in permuted order, and behind them those from position ``own`` on as they are.

    The position of permuted entries is -1: only rows behind a segment read it permuted, and these may
    see all of it.
    """
    H, permuted = order_HS.shape
    length, device = int(whole.lengths[0]), whole.k.device
    at_O = torch.arange(own, length, device=device)
    index_HS = torch.cat([order_HS, at_O.expand(H, -1)], 1)
    head_H1 = torch.arange(H, device=device)[:, None]
    positions_S = torch.cat([at_O.new_full((permuted,), -1), at_O]).int()
    return replace(
        whole,
        k=whole.k[head_H1, index_HS],
        v=whole.v[head_H1, index_HS],
        lengths=torch.full_like(whole.lengths, positions_S.numel()),
        positions=positions_S.expand(H, -1),
    )


def _means(q_TND: Tensor, block: int) -> Tensor:
    """``[R, N, D]`` float32 means of the query blocks; zeros fill the last one, as in the code."""
    whole = q_TND.shape[0] // block * block
    parts = [q_TND[:whole]]
    if whole < q_TND.shape[0]:
        parts.append(functional.pad(q_TND[whole:], (0, 0, 0, 0, 0, whole + block - q_TND.shape[0])))
    return torch.cat([x.view(-1, block, *x.shape[1:]).mean(1, dtype=torch.float32) for x in parts if len(x)])


def _fewest(p_NRC: Tensor, share: float) -> Tensor:
    """Per row the largest probabilities, as few as together reach ``share``."""
    best, order = p_NRC.sort(-1, descending=True)
    wanted = (best.cumsum(-1) - best < share) & (best > 0)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)


def _lists(mask_NRC: Tensor, block: int) -> Blocks:
    """The listed blocks of every row, as CSR."""
    counts = mask_NRC.sum(2)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    offsets = torch.cat([ends[:, :1] - counts[:, :1], ends], 1).int()
    return Blocks(block=block, offsets=offsets, columns=mask_NRC.nonzero()[:, 2].int())
