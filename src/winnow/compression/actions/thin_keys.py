"""Old keys lose the channels that the latest queries do not use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow._check import integer
from winnow.compression.actions.drop import kept
from winnow.compression.protocol import Plain
from winnow.store.codecs import ENTRIES
from winnow.types import Budget, Demotion, Needs, Observation, Plan, Scores

__all__ = ["ThinKeys", "channel_scores"]


def channel_scores(
    queries_WND: Tensor, k_HSD: Tensor, lengths: list[int], keep: tuple[Tensor, ...] | None
) -> Tensor:
    """``[H, D]`` float32: how much each channel of the keys contributes to the queries' scores.

    The squared Frobenius norm of the outer product of a channel's queries and keys, which is the
    product of their squared norms; over a GQA group, the mean of the queries' squared norms.

    Parameters
    ----------
    queries_WND : Tensor
        ``[W, H * G, D]``.
    k_HSD : Tensor
        ``[H, S, D]``, of which ``lengths[h]`` are valid.
    keep : tuple of Tensor, or None
        The entries of every head that count.
    """
    H, _, D = k_HSD.shape
    of_q_HD = queries_WND.float().square().sum(0).view(H, -1, D).mean(1)
    of_k = []
    for h, n in enumerate(lengths):
        k_SD = k_HSD[h, :n] if keep is None else k_HSD[h].index_select(0, keep[h].to(k_HSD.device))
        of_k.append(k_SD.float().square().sum(0))
    return of_q_HD * torch.stack(of_k)


@dataclass(frozen=True, kw_only=True)
class ThinKeys(Plain):
    """Drop what does not fit the budget, then thin the keys of all that stays but the newest ``recent``.

    The channels of the lowest :func:`channel_scores` are left out, head by head; of equal ones, the
    later. Whole pages of the store are thinned.

    Source: ThinK (arXiv 2407.21018), ``ThinK_eager/src/kv_pruning_utils.py``.

    Attributes
    ----------
    percent : int
        Channels left out, of a hundred, rounded down: 0 to 99.
    recent : int
        Newest entries of every head that keep all channels, at least 0.
    window : int
        Last queries that decide, at least 1.
    """

    percent: int = 40
    recent: int = 32
    window: int = 32

    def __post_init__(self) -> None:
        integer("thin-keys", "percent", self.percent, 0)
        integer("thin-keys", "recent", self.recent, 0)
        integer("thin-keys", "window", self.window, 1, "queries")
        if self.percent > 99:
            raise ValueError(f"thin-keys: percent={self.percent} leaves no channel; give 99 or less")

    @property
    def needs(self) -> Needs:
        """The window's queries."""
        return Needs(window_queries=self.window)

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: None) -> Plan:
        """Turn scores and a budget into a plan for one layer."""
        keep = kept(scores, budget)
        held = scores.lengths.tolist() if keep is None else [one.numel() for one in keep]
        old = max(0, min(held, default=0) - self.recent) // ENTRIES * ENTRIES
        D = seen.segment.k.shape[2]
        channels = D - D * self.percent // 100
        if old == 0 or channels == D:
            return Plan(keep=keep)
        assert seen.queries is not None, "the window's queries were not observed"
        value_HD = channel_scores(seen.queries[-self.window :], seen.segment.k, scores.lengths.tolist(), keep)
        best_HD = value_HD.sort(dim=1, descending=True, stable=True).indices
        kept_HC = best_HD[:, :channels].sort(1).values
        thin = Demotion(oldest=old, codec=f"thin:{channels}", channels=kept_HC)
        return Plan(keep=keep, demote=(thin,))
