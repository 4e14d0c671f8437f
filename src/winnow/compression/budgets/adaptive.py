"""AdaKV's budget: the heads of a layer share one, and heads with more strong scores get more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from winnow._check import integer
from winnow.compression.budgets.apportion import apportion
from winnow.compression.protocol import Plain, Setting
from winnow.types import Budget, Scores

__all__ = ["Adaptive", "shared_by_heads"]


@dataclass(frozen=True, kw_only=True)
class Adaptive(Plain):
    """The budget of a layer goes to its heads by how many of the layer's best scores each holds.

    Source: AdaKV (arXiv 2407.11550), ``adaptive_snapkv/monkeypatch/snapkv_utils.py``.

    With ``base = keep`` less the protected entries of a head: of the layer's ``H * base`` highest
    scores head ``h`` holds ``c_h``; it gets ``c_h * (1 - floor / base) + floor`` entries beside its
    protected ones. Rounding and heads that hold less than their share change the total by nothing.

    Attributes
    ----------
    keep : int
        Entries per KV head on average, protected ones included; at least 1.
    floor : int
        Entries that every head gets whatever its scores (the code's ``guaranteedalpha`` times the
        base), beside the protected ones.
    """

    keep: int
    floor: int = 0

    def __post_init__(self) -> None:
        integer("adaptive", "keep", self.keep, 1)
        integer("adaptive", "floor", self.floor, 0)
        if self.floor > self.keep:
            raise ValueError(
                f"adaptive: floor={self.floor} is above keep={self.keep}; guarantee at most the average"
            )

    @property
    def scope(self) -> Literal["layer", "model"]:
        """Layer by layer."""
        return "layer"

    @property
    def least(self) -> int | None:
        """A head may end with its protected entries and the floor: ``keep`` must leave room for both."""
        return self.keep

    def allocate(self, scores: Sequence[Scores], setting: Setting, state: None) -> list[Budget]:
        """One budget per layer; its entries add up to ``H * keep``, or to all there are."""
        return [Budget(entries=shared_by_heads(one, self.keep, self.floor)) for one in scores]


def shared_by_heads(scores: Scores, keep: int, floor: int) -> Tensor:
    """``[H]`` int32 entries per head: ``keep`` on average, shared by where the layer's best scores lie."""
    lengths = scores.lengths.tolist()
    guarded = scores.protected.sum(1).tolist()
    caps = [n - g for n, g in zip(lengths, guarded, strict=True)]
    total = sum(max(0, keep - g) for g in guarded)
    if total >= sum(caps):
        return scores.lengths.clone()
    open_HS = scores.value.masked_fill(scores.protected, -torch.inf)
    best = open_HS.flatten().topk(total).indices
    counts = torch.bincount(best // open_HS.shape[1], minlength=len(lengths)).tolist()
    base = total / len(lengths)
    guaranteed = min(floor, base)
    weights = [count * (1 - guaranteed / base) + guaranteed for count in counts]
    extra = apportion(weights, total, caps)
    return torch.tensor([g + e for g, e in zip(guarded, extra, strict=True)], dtype=torch.int32)
