"""The same number of entries for every layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from winnow._check import integer
from winnow.compression.protocol import Plain, Setting
from winnow.types import Budget, Scores

__all__ = ["Uniform"]


@dataclass(frozen=True, kw_only=True)
class Uniform(Plain):
    """Every KV head of every layer holds at most ``keep`` entries.

    Attributes
    ----------
    keep : int
        Entries per KV head, protected ones included; at least 1. A head that holds no more
        keeps everything.
    """

    keep: int

    def __post_init__(self) -> None:
        integer("uniform", "keep", self.keep, 1)

    @property
    def scope(self) -> Literal["layer", "model"]:
        """Layer by layer."""
        return "layer"

    @property
    def least(self) -> int | None:
        """The smallest budget that a long head can be given."""
        return self.keep

    def allocate(self, scores: Sequence[Scores], setting: Setting, state: None) -> list[Budget]:
        """One budget per layer: ``keep`` entries or the head's length, whichever is smaller."""
        return [Budget(entries=one.lengths.clamp(max=self.keep)) for one in scores]
