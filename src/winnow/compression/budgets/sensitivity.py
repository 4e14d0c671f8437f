"""EpiCache's budget: layers that suffer from a bounded context get more entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from winnow._check import integer
from winnow.compression.budgets.adaptive import shared_by_heads
from winnow.compression.budgets.apportion import apportion
from winnow.compression.protocol import Plain, Setting
from winnow.types import Budget, Needs, Profile, Scores

__all__ = ["Sensitivity", "layer_budgets"]


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Plain):
    """Share the model's budget over its layers by a profile, and a layer's over its heads by scores.

    Source: EpiCache (arXiv 2509.17396), ``data/layer_scores/layer_profile.py`` of apple/ml-epicache.

    With ``s_l`` the mean cosine between the keys of a layer under full and under block-local attention,
    scaled to 0 .. 1 over the layers, layer ``l`` weighs ``(1 - s_l) ^ power``. No layer gets less than a
    quarter of the mean; what that takes is taken from the others, so that the total holds (in the code
    the sum exceeds it).

    Attributes
    ----------
    keep : int
        Entries per KV head on average over layers and heads.
    power : float
        Sharpness of the sharing (1.1 in the code's Llama script); 0 gives all layers the same.
    heads : {"pair", "uniform"}
        A layer's heads share its budget by their best scores (each gets at least one entry), or hold the
        same number.
    """

    keep: int
    power: float = 1.1
    heads: Literal["pair", "uniform"] = "pair"

    def __post_init__(self) -> None:
        integer("sensitivity", "keep", self.keep, 1)
        if self.power < 0:
            raise ValueError(f"sensitivity: power={self.power} will not do; give 0 or more")
        if self.heads not in ("pair", "uniform"):
            raise ValueError(f"sensitivity: heads={self.heads!r} is unknown; give 'pair' or 'uniform'")

    @property
    def needs(self) -> Needs:
        """The profile ``layer-sensitivity``."""
        return Needs(profile=True)

    @property
    def scope(self) -> Literal["layer", "model"]:
        """Layer by layer: the profile says what each gets."""
        return "layer"

    @property
    def least(self) -> int | None:
        """A layer gets at least a quarter of the mean."""
        return max(1, self.keep // 4)

    def allocate(self, scores: Sequence[Scores], setting: Setting, state: None) -> list[Budget]:
        """One budget per layer."""
        assert setting.profile is not None
        of_layers = layer_budgets(setting.profile, self.keep, self.power)
        out = []
        for layer, one in zip(setting.layers, scores, strict=True):
            keep = of_layers[layer]
            if self.heads == "uniform":
                out.append(Budget(entries=one.lengths.clamp(max=keep)))
            else:
                out.append(Budget(entries=shared_by_heads(one, keep, floor=1)))
        return out


def layer_budgets(profile: Profile, keep: int, power: float) -> list[int]:
    """Entries per KV head of every layer; they add up to ``L * keep``.

    Raises
    ------
    ValueError
        If the profile is of another kind.
    """
    if profile.kind != "layer-sensitivity":
        raise ValueError(
            f"sensitivity: the profile is of kind {profile.kind!r}; make one with "
            f"'winnow profile layer-sensitivity MODEL'"
        )
    cosine_L = profile.tensors["cosine"].double()
    low, high = float(cosine_L.min()), float(cosine_L.max())
    alike_L = (cosine_L - low) / (high - low) if high > low else torch.zeros_like(cosine_L)
    weights: list[float] = ((1 - alike_L) ** power).tolist()
    layers, floor = len(weights), max(1, keep // 4)
    # Below the floor a share is raised to it, and the others share what is left.
    out = [0] * layers
    open_ = list(range(layers))
    while True:
        left = keep * layers - floor * (layers - len(open_))
        shares = apportion([weights[i] for i in open_], left, [left] * len(open_))
        low_ones = [i for i, share in zip(open_, shares, strict=True) if share < floor]
        if not low_ones:
            for i, share in zip(open_, shares, strict=True):
                out[i] = share
            return [entries or floor for entries in out]
        open_ = [i for i in open_ if i not in low_ones]
