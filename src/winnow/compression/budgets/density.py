"""D2O's budget: layers whose attention is spread evenly get more than layers that look at few entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from winnow._check import integer
from winnow.compression.budgets.apportion import apportion
from winnow.compression.protocol import Plain, Setting
from winnow.types import Budget, Scores

__all__ = ["Density"]


@dataclass(frozen=True, kw_only=True)
class Density(Plain):
    """Share the model's budget over its layers by the density of their attention.

    Source: D2O (arXiv 2406.13035), ``modeling_llama3_new.py``.

    The density of a layer is the variance over entries of the accumulated attention (the scores),
    min-max normalised over the heads and averaged: high where few entries hold it all. Layers share by
    ``softmax(-density)``. Decided once, when the recipe first acts on a sequence.

    Attributes
    ----------
    keep : int
        Entries per KV head and layer on average over the layers that take part; at least 1.
    dense_first, dense_last : int
        First and last layers that take no part and keep everything.
    least : int
        Fewest entries that a layer's heads are given (the protected ones must fit in).
    """

    keep: int
    dense_first: int = 2
    dense_last: int = 1
    least: int = 1

    def __post_init__(self) -> None:
        integer("density", "keep", self.keep, 1)
        integer("density", "dense_first", self.dense_first, 0, "layers")
        integer("density", "dense_last", self.dense_last, 0, "layers")
        integer("density", "least", self.least, 1)
        if self.least > self.keep:
            raise ValueError(f"density: least={self.least} is above keep={self.keep}; lower it or keep more")

    @property
    def scope(self) -> Literal["layer", "model"]:
        """All layers together."""
        return "model"

    def state(self) -> dict[int, int]:
        """Entries per head of each layer, once they are decided."""
        return {}

    def allocate(self, scores: Sequence[Scores], setting: Setting, state: dict[int, int]) -> list[Budget]:
        """One budget per layer; they add up to ``keep`` per head of the layers that take part."""
        if not state and any(int(one.lengths.max()) > self.keep for one in scores):
            state.update(self._decide(scores, setting))
        return [
            Budget(entries=one.lengths.clamp(max=state.get(layer, int(one.lengths.max()))))
            for layer, one in zip(setting.layers, scores, strict=True)
        ]

    def _decide(self, scores: Sequence[Scores], setting: Setting) -> dict[int, int]:
        inner = [
            (layer, one)
            for layer, one in zip(setting.layers, scores, strict=True)
            if self.dense_first <= layer < setting.of - self.dense_last
        ]
        if not inner:
            return {}
        share = torch.softmax(-torch.tensor([_density(one) for _, one in inner]), 0).tolist()
        caps = [int(one.lengths.max()) for _, one in inner]
        floors = [min(self.least, cap) for cap in caps]
        total = max(0, self.keep * len(inner) - sum(floors))
        extra = apportion(share, total, [cap - floor for cap, floor in zip(caps, floors, strict=True)])
        return {layer: f + e for (layer, _), f, e in zip(inner, floors, extra, strict=True)}


def _density(scores: Scores) -> float:
    spread = [
        float(scores.value[h, :n].var(correction=0)) if n else 0.0
        for h, n in enumerate(scores.lengths.tolist())
    ]
    low, high = min(spread), max(spread)
    if high <= low:
        return 0.0
    return sum((one - low) / (high - low) for one in spread) / len(spread)
