"""The last prompt queries vote on which earlier entries will matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from winnow._check import integer
from winnow.compression.protocol import Plain
from winnow.types import Needs, Observation, Scores

__all__ = ["WindowAttention"]

_TILE = 1 << 23  # logits that are held at a time, beyond those of a single query head


@dataclass(frozen=True, kw_only=True)
class WindowAttention(Plain):
    """SnapKV's score: attention of the last ``window`` queries, pooled along the sequence.

    Source: SnapKV (arXiv 2404.14469), ``snapkv/monkeypatch/snapkv_utils.py``.

    With ``A = softmax(q k^T * scale + causal mask)`` in float32 over all entries, the score of
    entry ``j`` before the window is the sum of ``A[:, j]`` over the window's queries, pooled
    with stride 1 over ``pool`` neighbours, then averaged over the ``G`` query heads of its KV
    head. The last ``window`` entries are protected.

    Attributes
    ----------
    window : int
        Queries that vote and entries that are protected (``w``), at least 1.
    pool : int
        Neighbours pooled (``kernel_size``), odd; 1 pools nothing.
    pooling : {"avg", "max"}

    Notes
    -----
    Deviations from the official code:

    - Scope: one list per KV head, by the mean over its group, after pooling (the order matters
      with ``max``). The code repeats K and V to all query heads first, so its cache holds ``G``
      times as many entries for the same budget.
    - Average pooling divides by the neighbours that exist. The code counts the zero padding
      and so damps the entries at both borders.
    - The code casts ``A`` to the model's dtype before summing; here it stays float32.
    """

    window: int = 32
    pool: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        integer("window-attention", "window", self.window, 1, "queries")
        integer("window-attention", "pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ValueError(
                f"window-attention: pool={self.pool} is even, so no entry is its centre; "
                f"give {self.pool - 1} or {self.pool + 1}"
            )
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"window-attention: pooling={self.pooling!r} is unknown; give 'avg' or 'max'")

    @property
    def needs(self) -> Needs:
        """The window's queries."""
        return Needs(window_queries=self.window)

    @property
    def protects(self) -> int:
        """Entries per head that are protected."""
        return self.window

    def score(self, seen: Observation, state: None) -> Scores:
        """Score the entries of one layer; memory beyond the scores is ``O(window * S)``."""
        assert seen.queries is not None, "the window's queries were not observed"
        assert seen.query_positions is not None, "the window's positions were not observed"
        segment = seen.segment
        H, S = segment.heads, int(segment.lengths.max()) if segment.heads else 0
        device = segment.k.device
        value_HS = torch.full((H, S), -torch.inf, device=device)
        protected_HS = torch.zeros(H, S, dtype=torch.bool, device=device)
        # One buffer for all heads: fresh pages for each would cost more than the arithmetic.
        k_SD = torch.empty(S, segment.k.shape[2], device=device)
        for h in range(H):
            n = int(segment.lengths[h])
            before = max(0, n - self.window)
            protected_HS[h, before:n] = True
            # Protected entries need no vote; a finite value keeps the tensor free of traps.
            value_HS[h, before:n] = 0.0
            if before:
                value_HS[h, :before] = self._votes(seen, h, k_SD[:n].copy_(segment.k[h, :n]))[:before]
        return Scores(value=value_HS, protected=protected_HS, lengths=segment.lengths)

    def _votes(self, seen: Observation, h: int, k_SD: Tensor) -> Tensor:
        """``[S - window]`` pooled votes on one KV head, mean over its query heads."""
        assert seen.queries is not None
        assert seen.query_positions is not None
        segment, spec = seen.segment, seen.spec
        n = k_SD.shape[0]
        queries_WND = seen.queries[-self.window :]
        window, heads = queries_WND.shape[:2]
        group = heads // segment.heads
        first, hidden_WS = _hidden(
            seen.query_positions[-self.window :].to(k_SD.device), segment.positions_of(h), spec.window
        )
        total_S = k_SD.new_zeros(n - self.window)
        together = max(1, _TILE // (window * n))
        for g in range(0, group, together):
            rows = slice(h * group + g, h * group + min(g + together, group))
            q_GWD = queries_WND[:, rows].transpose(0, 1).float() * spec.scale
            logits_GWS = (q_GWD.flatten(0, 1) @ k_SD.T).view(-1, window, n)
            if spec.softcap is not None:
                logits_GWS = spec.softcap * torch.tanh(logits_GWS / spec.softcap)
            if segment.bias is not None:
                logits_GWS += segment.bias[h, :n]
            logits_GWS[..., first:].masked_fill_(hidden_WS, -torch.inf)
            lse_GW = torch.logsumexp(logits_GWS, -1)
            if spec.sinks is not None:
                lse_GW = torch.logaddexp(lse_GW, spec.sinks[rows].float().unsqueeze(1))
            votes_GS = logits_GWS[..., : total_S.numel()].sub_(lse_GW.unsqueeze(-1)).exp_().sum(1)
            total_S += self._pooled(votes_GS).sum(0)
        return total_S / group

    def _pooled(self, votes_GS: Tensor) -> Tensor:
        rows, side = votes_GS.unsqueeze(1), self.pool // 2
        if self.pooling == "max":
            return functional.max_pool1d(rows, self.pool, stride=1, padding=side).squeeze(1)
        pooled = functional.avg_pool1d(rows, self.pool, stride=1, padding=side, count_include_pad=False)
        return pooled.squeeze(1)


def _hidden(q_pos_W: Tensor, k_pos_S: Tensor, window: int | None) -> tuple[int, Tensor]:
    """First entry that some query does not see, and ``[W, S - first]`` bool which it does not see.

    Without a sliding window only the newest entries can be hidden: positions ascend.
    """
    first = 0 if window is not None else int(torch.searchsorted(k_pos_S, q_pos_W[0], right=True))
    gap_WS = q_pos_W[:, None] - k_pos_S[None, first:]
    hidden_WS = gap_WS < 0
    return first, hidden_WS if window is None else hidden_WS | (gap_WS >= window)
