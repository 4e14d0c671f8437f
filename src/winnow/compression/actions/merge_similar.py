"""Fold what does not fit into the most similar entry that stays, where it is similar enough."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.compression.actions.drop import kept
from winnow.compression.protocol import Plain
from winnow.kernels.nearest import nearest
from winnow.types import Budget, Observation, Plan, Rewrite, Scores

__all__ = ["MergeSimilar"]


@dataclass(frozen=True, kw_only=True)
class MergeSimilar(Plain):
    """D2O's compensation: dropped entries are merged into kept ones, above a moving threshold.

    Source: D2O (arXiv 2406.13035), section 3.3, and ``LLM_merge_new`` of its code.

    For a dropped entry ``e``, ``u_e`` is the largest cosine between its key and a kept key of its
    head, ``c(e)`` that entry. Where ``u_e`` reaches the threshold, ``e`` joins the group of
    ``c(e)``; keys and values of a group become the mean with weights ``exp(u_e)``, and ``exp(1)`` for
    the kept entry itself. The threshold of a layer begins as the mean of ``u``, and moves to
    ``smooth * threshold + (1 - smooth) * mean(u)`` at each later action.

    Attributes
    ----------
    smooth : float
        Weight of the old threshold (``alpha``; the paper's ``beta`` is what is missing to 1).
    keys : bool
        Merge keys too, as the paper does. A mean of keys that were turned to different positions has
        no position of its own; False merges values alone.
    """

    smooth: float = 0.5
    keys: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"merge-similar: smooth={self.smooth} will not do; give a number from 0 to 1")

    def state(self) -> dict[int, float]:
        """The threshold of each layer, once there is one."""
        return {}

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: dict[int, float]) -> Plan:
        """Keep as ``Drop`` does, and rewrite the entries that take others in."""
        keep = kept(scores, budget)
        if keep is None:
            return Plan()
        segment = seen.segment
        found = [_nearest(segment.k[h, :n], keep[h]) for h, n in enumerate(segment.lengths.tolist())]
        threshold = self._threshold(seen.layer, torch.cat([cosine for _, cosine, _ in found]), state)
        rewrite = tuple(
            self._merged(segment.k[h], segment.v[h], keep[h], gone, cosine, target, threshold)
            for h, (gone, cosine, target) in enumerate(found)
        )
        return Plan(keep=keep, rewrite=rewrite if any(rewrite) else None)

    def _threshold(self, layer: int, cosines: Tensor, state: dict[int, float]) -> float:
        if cosines.numel() == 0:
            return math.inf
        mean = float(cosines.mean())
        before = state.get(layer, mean)
        state[layer] = self.smooth * before + (1 - self.smooth) * mean
        return state[layer]

    def _merged(
        self,
        k_SD: Tensor,
        v_SD: Tensor,
        keep: Tensor,
        gone: Tensor,
        cosine: Tensor,
        target: Tensor,
        limit: float,
    ) -> Rewrite | None:
        near = cosine >= limit
        if not bool(near.any()):
            return None
        gone, cosine, target = gone[near], cosine[near], target[near]
        hosts, group = torch.unique(target, return_inverse=True)
        own, theirs = math.e, cosine.exp()
        total = torch.full((hosts.numel(),), own).index_add_(0, group, theirs)

        def mean(x_SD: Tensor) -> Tensor:
            sums = x_SD[keep[hosts]].float() * own
            sums.index_add_(0, group, x_SD[gone].float() * theirs.unsqueeze(1))
            return (sums / total.unsqueeze(1)).to(x_SD.dtype)

        entries = keep[hosts]
        return Rewrite(entries=entries, k=mean(k_SD) if self.keys else k_SD[entries], v=mean(v_SD))


def _nearest(k_SD: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries that go, the largest cosine of each with a kept key, and which of the kept that is."""
    stays = torch.zeros(k_SD.shape[0], dtype=torch.bool)
    stays[keep] = True
    gone = (~stays).nonzero().flatten()
    if gone.numel() == 0:
        return gone, torch.empty(0), gone
    return gone, *nearest(k_SD, gone, keep)
