"""RazorAttention's budget: heads that retrieve keep everything, the others a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from winnow._check import integer
from winnow.compression.protocol import Plain, Setting
from winnow.types import Budget, Needs, Profile, Scores

__all__ = ["RetrievalHeads", "chosen"]


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(Plain):
    """Everything for the KV heads that a profile shows to retrieve, a window for the rest.

    Source: RazorAttention (arXiv 2407.15891), Algorithm 1.

    Attributes
    ----------
    induction, echo : int
        Percent of the model's KV heads that are taken by induction and by echo score, ranked over all
        layers together; a head in either set retrieves. Above 0 percent at least one head is taken.
    sinks : int
        First entries that the other heads keep beside their window (``N_0``).
    buffer : int
        Fewest entries of their window (``S_0``).
    divisor : int
        Their window is at least the sequence's length over this (``C``).
    spare : int
        Entries beside sinks and window: 1 where an action keeps one that stands for the dropped.
    """

    induction: int = 14
    echo: int = 1
    sinks: int = 4
    buffer: int = 4000
    divisor: int = 5
    spare: int = 1

    exempt = {  # noqa: RUF012 (read by the contract suite)
        "total preserved": "heads that retrieve keep all they have: there is no total to keep to",
    }

    def __post_init__(self) -> None:
        for name in ("induction", "echo"):
            integer("retrieval-heads", name, getattr(self, name), 0, "percent")
            if getattr(self, name) > 100:
                raise ValueError(f"retrieval-heads: {name}={getattr(self, name)} percent; give at most 100")
        integer("retrieval-heads", "sinks", self.sinks, 0)
        integer("retrieval-heads", "buffer", self.buffer, 1)
        integer("retrieval-heads", "divisor", self.divisor, 1)
        integer("retrieval-heads", "spare", self.spare, 0)

    @property
    def needs(self) -> Needs:
        """The profile ``retrieval-heads``."""
        return Needs(profile=True)

    @property
    def scope(self) -> Literal["layer", "model"]:
        """Layer by layer."""
        return "layer"

    @property
    def least(self) -> int | None:
        """What a head that does not retrieve keeps at least."""
        return self.sinks + self.buffer + self.spare

    def allocate(self, scores: Sequence[Scores], setting: Setting, state: None) -> list[Budget]:
        """One budget per layer."""
        assert setting.profile is not None
        retrieves_LH = chosen(setting.profile, self.induction, self.echo)
        window = self.sinks + max(self.buffer, setting.tokens // self.divisor) + self.spare
        return [
            Budget(entries=torch.where(retrieves_LH[layer], one.lengths, one.lengths.clamp(max=window)))
            for layer, one in zip(setting.layers, scores, strict=True)
        ]


def chosen(profile: Profile, induction: int, echo: int) -> Tensor:
    """``[L, H]`` bool: the heads with the highest scores over all layers, by either score.

    Raises
    ------
    ValueError
        If the profile is of another kind.
    """
    if profile.kind != "retrieval-heads":
        raise ValueError(
            f"retrieval-heads: the profile is of kind {profile.kind!r}; make one with "
            f"'winnow profile retrieval-heads MODEL --out FILE'"
        )
    mask_LH = torch.zeros_like(profile.tensors["induction"], dtype=torch.bool)
    for name, percent in (("induction", induction), ("echo", echo)):
        heads = mask_LH.numel()
        count = max(1, round(heads * percent / 100)) if percent else 0
        best = profile.tensors[name].flatten().topk(count).indices
        mask_LH.view(-1)[best] = True
    return mask_LH
