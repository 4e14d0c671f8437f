"""AnchorAttention: keep the key columns that come close to the largest local score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow._check import integer
from winnow.generation.protocol import PrefillLayer
from winnow.kernels.prefill import prefill
from winnow.types import Needs, Partial, Pattern, Segment, Stripes, Window

__all__ = ["Anchor"]


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Difference-aware stripes: the largest score of the initial and local entries is the
    *anchor*; every other key column within ``theta`` of it is read as well.

    Source: AnchorAttention (arXiv 2505.23520, EMNLP 2025) and its released Triton kernels.

    Queries are grouped by absolute position into tiles of ``block`` and super-blocks of
    ``step`` tiles. For each super-block:

    1. *Anchor pass.* Exact attention over the first ``init`` positions and the super-block's
       own ones, keeping each row's largest scaled logit ``m``.
    2. *Identification.* With ``q`` and ``a`` the means of the queries and of ``m`` over a tile,
       column ``j`` between the two regions is kept iff ``q . k_j * scale + theta >= a`` for any
       tile of the super-block.
    3. *Sparse pass.* Every query of the super-block reads the kept columns; the result is
       merged with that of the anchor pass.

    Attributes
    ----------
    theta : float
        Distance to the anchor in nats. ``inf`` equals dense attention, ``-inf`` equals
        attention over the initial and local entries alone.
    block : int
        Queries per tile (``B``).
    step : int
        Tiles per super-block (``s``); ``block * step`` queries share a list of columns.
    init : int
        First positions, which every query reads.

    Notes
    -----
    Deviations from the released code, which would otherwise be wrong or approximate:

    - The initial region is ``init`` positions in both passes. The code reads a whole
      super-block as initial in pass 1 but identifies from token 128 on, and so counts columns
      128 to 2047 twice; it also stops identification one tile before the super-block, and never
      reads the last 128 tokens before it. Here the three regions tile the sequence.
    - Anchors are compared in float32, not bfloat16; the product ``q . k_j`` is taken in the
      dtype of the keys, so in bfloat16 a column within 2**-8 of the threshold may fall on
      either side. Attention over whatever was kept is exact.
    - Any length: the code needs multiples of ``block * step``. A tile that this call holds only
      in part is the mean of the rows it holds.
    - Tiles and super-blocks are counted from position 0 of the sequence, not from the call, so
      chunked prefill at multiples of ``block * step`` equals whole prefill.

    As in the code, each query head identifies its own columns (scope: query head).
    """

    theta: float = 12.0
    block: int = 128
    step: int = 16
    init: int = 128

    def __post_init__(self) -> None:
        integer("anchor", "block", self.block, 1, "tokens")
        integer("anchor", "step", self.step, 1, "tiles")
        integer("anchor", "init", self.init, 0, "tokens")
        if isinstance(self.theta, bool) or not isinstance(self.theta, (int, float)) or math.isnan(self.theta):
            raise ValueError(f"anchor: theta={self.theta!r} will not do; give a number of nats, such as 12.0")
        object.__setattr__(self, "theta", float(self.theta))

    @property
    def needs(self) -> Needs:
        """Nothing: the part runs its own anchor pass."""
        return Needs()

    @property
    def chunk_multiple(self) -> int:
        """Queries per super-block."""
        return self.block * self.step

    @property
    def tail(self) -> int:
        """None: the end of a prompt is computed like its inside."""
        return 0

    def state(self) -> None:
        """No state."""

    def patterns(self, ctx: PrefillLayer, state: None) -> tuple[Pattern, ...]:
        """Anchor pass over every segment, then stripes of each from the common anchors."""
        rows = self.block * self.step
        near = Window(init=self.init, local=rows, align=rows)
        done = [
            prefill(
                ctx.q,
                segment,
                spec=ctx.spec,
                query_positions=ctx.query_positions,
                form=near,
                want_row_max=True,
                backend=ctx.backend,
            )
            for segment in ctx.segments
        ]
        first, last = int(ctx.query_positions[0]), int(ctx.query_positions[-1])
        assert last - first == ctx.q.shape[0] - 1, "stripes need consecutive query positions"
        q_AND, anchor_AN = self._tiles(ctx.q, done, first)
        patterns = []
        for segment, part in zip(ctx.segments, done, strict=True):
            form, scored = self._stripes(ctx, segment, q_AND, anchor_AN, first)
            patterns.append(Pattern(form=form, done=part, scored=scored))
        return tuple(patterns)

    def _tiles(self, q_TND: Tensor, done: list[Partial], first: int) -> tuple[Tensor, Tensor]:
        """Mean query ``[A, N, D]`` and mean anchor ``[A, N]`` of every tile, in float32."""
        maxima = [part.row_max for part in done]
        top_TN = maxima[0]
        assert top_TN is not None
        for other in maxima[1:]:
            assert other is not None
            top_TN = torch.maximum(top_TN, other)
        return _tile_means(q_TND, first, self.block), _tile_means(top_TN, first, self.block)

    def _stripes(
        self, ctx: PrefillLayer, segment: Segment, q_AND: Tensor, anchor_AN: Tensor, first: int
    ) -> tuple[Stripes | None, int]:
        """The kept columns of one segment, None where nothing was kept, and the products it took."""
        rows = self.block * self.step
        phase = first % rows
        supers = -(-(ctx.q.shape[0] + phase) // rows)
        heads, device = ctx.q.shape[1], ctx.q.device
        group = heads // segment.heads
        # The first super-block of this call may hold fewer tiles than `step`.
        behind = first // self.block % self.step
        none = torch.empty(0, dtype=torch.int32, device=device)
        lists: list[list[Tensor]] = [[none] * supers for _ in range(heads)]
        scored = 0
        for h in range(segment.heads):
            pos_S = segment.positions_of(h)
            of_head = slice(h * group, (h + 1) * group)
            for b in range(supers):
                start = (first // rows + b) * rows
                after = self.init if ctx.spec.window is None else max(self.init, start - ctx.spec.window + 1)
                lo, hi = (int(x) for x in torch.searchsorted(pos_S, pos_S.new_tensor([after, start])))
                if lo >= hi:
                    continue
                tiles = slice(max(0, b * self.step - behind), (b + 1) * self.step - behind)
                kept_GS = self._identify(
                    ctx, segment, h, lo, hi, q_AND[tiles, of_head], anchor_AN[tiles, of_head]
                )
                scored += q_AND[tiles].shape[0] * group * (hi - lo)
                for g, column_S in enumerate(kept_GS):
                    lists[h * group + g][b] = column_S.nonzero().flatten().int() + lo
        counts = torch.tensor([[x.numel() for x in of_head] for of_head in lists], device=device)
        if int(counts.sum()) == 0:
            return None, scored
        ends = counts.flatten().cumsum(0).view(heads, supers)
        offsets = torch.cat([ends[:, :1] - counts[:, :1], ends], 1).int()
        columns = torch.cat([x for of_head in lists for x in of_head])
        return Stripes(rows=rows, phase=phase, offsets=offsets, columns=columns), scored

    def _identify(
        self, ctx: PrefillLayer, segment: Segment, h: int, lo: int, hi: int, q_aGD: Tensor, anchor_aG: Tensor
    ) -> Tensor:
        """``[G, hi - lo]`` bool: which columns any tile of one super-block keeps.

        The largest tensor is ``[G * step, hi - lo]``; nothing of size ``T x S`` is made.
        """
        q_GaD = q_aGD.transpose(0, 1)
        logits = (q_GaD.reshape(-1, q_GaD.shape[2]) * ctx.spec.scale).to(segment.k.dtype) @ segment.k[
            h, lo:hi
        ].T
        logits_GaS = logits.float().view(*q_GaD.shape[:2], hi - lo)
        if ctx.spec.softcap is not None:
            logits_GaS = ctx.spec.softcap * torch.tanh(logits_GaS / ctx.spec.softcap)
        if segment.bias is not None:
            logits_GaS = logits_GaS + segment.bias[h, lo:hi]
        return (logits_GaS - anchor_aG.T.unsqueeze(-1)).amax(1) >= -self.theta


def _tile_means(x_TX: Tensor, first: int, block: int) -> Tensor:
    """Float32 means over tiles of ``block`` rows; row 0 is at position ``first``, the ends may be partial."""
    T = x_TX.shape[0]
    head = min(-first % block, T)
    whole = (T - head) // block
    tail = head + whole * block
    means = [x_TX[head:tail].reshape(whole, block, *x_TX.shape[1:]).mean(1, dtype=torch.float32)]
    if head:
        means.insert(0, x_TX[:head].mean(0, keepdim=True, dtype=torch.float32))
    if tail < T:
        means.append(x_TX[tail:].mean(0, keepdim=True, dtype=torch.float32))
    return torch.cat(means)
