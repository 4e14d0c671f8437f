"""The last prompt queries vote on which earlier entries will matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from winnow._check import integer
from winnow.types import Needs, Observation, Scores

__all__ = ["WindowAttention"]


@dataclass(frozen=True, kw_only=True)
class WindowAttention:
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

    def score(self, seen: Observation) -> Scores:
        """Score the entries of one layer; memory beyond the scores is ``O(window * S)``."""
        assert seen.queries is not None, "the window's queries were not observed"
        assert seen.query_positions is not None, "the window's positions were not observed"
        segment = seen.segment
        H, S = segment.heads, int(segment.lengths.max()) if segment.heads else 0
        value_HS = torch.full((H, S), -torch.inf, device=segment.k.device)
        protected_HS = torch.zeros(H, S, dtype=torch.bool, device=segment.k.device)
        for h in range(H):
            n = int(segment.lengths[h])
            before = max(0, n - self.window)
            protected_HS[h, before:n] = True
            # Protected entries need no vote; a finite value keeps the tensor free of traps.
            value_HS[h, before:n] = 0.0
            if before:
                value_HS[h, :before] = self._votes(seen, h, n, before)
        return Scores(value=value_HS, protected=protected_HS, lengths=segment.lengths)

    def _votes(self, seen: Observation, h: int, n: int, before: int) -> Tensor:
        """``[before]`` pooled votes on one KV head, mean over its query heads."""
        assert seen.queries is not None
        assert seen.query_positions is not None
        segment, spec = seen.segment, seen.spec
        queries_WND = seen.queries[-self.window :]
        group = queries_WND.shape[1] // segment.heads
        k_DS = segment.k[h, :n].float().T
        q_pos_W = seen.query_positions[-self.window :].to(k_DS.device)
        gap_WS = q_pos_W[:, None] - segment.positions_of(h)[None]
        hidden_WS = gap_WS < 0
        if spec.window is not None:
            hidden_WS |= gap_WS >= spec.window
        total = torch.zeros(before, device=k_DS.device)
        for g in range(group):
            logits_WS = (queries_WND[:, h * group + g].float() * spec.scale) @ k_DS
            if spec.softcap is not None:
                logits_WS = spec.softcap * torch.tanh(logits_WS / spec.softcap)
            if segment.bias is not None:
                logits_WS += segment.bias[h, :n]
            logits_WS.masked_fill_(hidden_WS, -torch.inf)
            lse_W = torch.logsumexp(logits_WS, -1)
            if spec.sinks is not None:
                lse_W = torch.logaddexp(lse_W, spec.sinks[h * group + g].float())
            votes_S = (logits_WS[:, :before] - lse_W[:, None]).exp_().sum(0)
            total += self._pooled(votes_S)
        return total / group

    def _pooled(self, votes_S: Tensor) -> Tensor:
        row = votes_S.view(1, 1, -1)
        side = self.pool // 2
        if self.pooling == "max":
            return functional.max_pool1d(row, self.pool, stride=1, padding=side).flatten()
        pooled = functional.avg_pool1d(row, self.pool, stride=1, padding=side, count_include_pad=False)
        return pooled.flatten()
