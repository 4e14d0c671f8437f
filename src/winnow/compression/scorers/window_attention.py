"""The last prompt queries vote on which earlier entries will matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from winnow._check import integer
from winnow.compression.protocol import Plain
from winnow.kernels.mass import mass
from winnow.kernels.merge import add_sinks
from winnow.kernels.prefill import prefill
from winnow.types import Needs, Observation, Scores

__all__ = ["WindowAttention"]


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
        """Score the entries of one layer; memory beyond the scores is one number per query head and entry."""
        assert seen.queries is not None, "the window's queries were not observed"
        assert seen.query_positions is not None, "the window's positions were not observed"
        segment, spec = seen.segment, seen.spec
        q_WND, at_W = seen.queries[-self.window :], seen.query_positions[-self.window :]
        H, S = segment.heads, int(segment.lengths.max()) if segment.heads else 0
        partial = prefill(q_WND, segment, spec=spec, query_positions=at_W)
        if spec.sinks is not None:
            partial = add_sinks(partial, spec.sinks)
        votes_NS = mass(q_WND, segment, spec=spec, query_positions=at_W, lse=partial.lse)
        value_HS = torch.full((H, S), -torch.inf, device=segment.k.device)
        protected_HS = torch.zeros(H, S, dtype=torch.bool, device=segment.k.device)
        lengths = segment.lengths.tolist()
        for n in set(lengths):  # heads of one length together
            heads = torch.tensor([h for h, length in enumerate(lengths) if length == n])
            heads, before = heads.to(value_HS.device), max(0, n - self.window)
            protected_HS[heads, before:n] = True
            # Protected entries need no vote; a finite value keeps the tensor free of traps.
            value_HS[heads, before:n] = 0.0
            if before:
                votes_HGS = votes_NS.view(H, -1, S)[heads, :, :before]
                value_HS[heads, :before] = self._pooled(votes_HGS).mean(1)
        return Scores(value=value_HS, protected=protected_HS, lengths=segment.lengths)

    def _pooled(self, votes_HGS: Tensor) -> Tensor:
        side = self.pool // 2
        if self.pooling == "max":
            return functional.max_pool1d(votes_HGS, self.pool, stride=1, padding=side)
        return functional.avg_pool1d(votes_HGS, self.pool, stride=1, padding=side, count_include_pad=False)
