"""The largest attention that any query of a probe gives an entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow._check import integer
from winnow.compression.protocol import Plain
from winnow.types import Needs, Observation, Scores

__all__ = ["PeakAttention"]

_TILE = 1 << 23  # logits that are held at a time


@dataclass(frozen=True, kw_only=True)
class PeakAttention(Plain):
    """EpiCache's score: the maximum over probe queries and over the query heads of a KV head.

    Source: EpiCache (arXiv 2509.17396), ``attention/score.py`` of apple/ml-epicache.

    ``score_j = max over queries i and heads of softmax(q_i k_j * scale)`` over the entries that are
    held; the probe's own entries are not among them. Nothing is protected.

    Attributes
    ----------
    window : int
        Last queries of what was read that stand in where the sequence has no probe, at least 1.
    """

    window: int = 32

    def __post_init__(self) -> None:
        integer("peak-attention", "window", self.window, 1, "queries")

    @property
    def needs(self) -> Needs:
        """The queries of a probe, or the last ones."""
        return Needs(window_queries=self.window, probe=True)

    def score(self, seen: Observation, state: None) -> Scores:
        """Score the entries of one layer; memory beyond the scores is bounded."""
        assert seen.queries is not None, "the probe was not observed"
        assert seen.query_positions is not None, "its positions were not observed"
        queries, at_W, segment = seen.queries, seen.query_positions.long(), seen.segment
        H, S = segment.heads, int(segment.lengths.max())
        value_HS = torch.full((H, S), -torch.inf, device=segment.k.device)
        group = queries.shape[1] // H
        for h, n in enumerate(segment.lengths.tolist()):
            k_SD, where_S = segment.k[h, :n].float(), segment.positions_of(h).long()
            rows = max(1, _TILE // max(1, n * group))
            best_S = torch.zeros(n, device=k_SD.device)
            for first in range(0, queries.shape[0], rows):
                tile = slice(first, first + rows)
                q_WGD = queries[tile, h * group : (h + 1) * group].float()
                logits_WGS = self._logits(seen, h, q_WGD @ k_SD.T, at_W[tile, None] - where_S)
                best_S = torch.maximum(best_S, logits_WGS.softmax(-1).nan_to_num(0.0).amax((0, 1)))
            value_HS[h, :n] = best_S
        return Scores(value=value_HS, protected=torch.zeros(H, S, dtype=torch.bool), lengths=segment.lengths)

    @staticmethod
    def _logits(seen: Observation, h: int, products_WGS: Tensor, gap_WS: Tensor) -> Tensor:
        spec, bias = seen.spec, seen.segment.bias
        logits_WGS = products_WGS * spec.scale
        if spec.softcap is not None:
            logits_WGS = spec.softcap * torch.tanh(logits_WGS / spec.softcap)
        if bias is not None:
            logits_WGS = logits_WGS + bias[h, : logits_WGS.shape[2]]
        hidden_WS = gap_WS < 0 if spec.window is None else (gap_WS < 0) | (gap_WS >= spec.window)
        return logits_WGS.masked_fill(hidden_WS[:, None], -torch.inf)
