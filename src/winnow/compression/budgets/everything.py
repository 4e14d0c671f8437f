"""No entry is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from winnow.compression.protocol import Plain, Setting
from winnow.types import Budget, Scores

__all__ = ["Everything"]


@dataclass(frozen=True, kw_only=True)
class Everything(Plain):
    """Every head holds what it has: the budget of recipes that only change the form of entries."""

    @property
    def scope(self) -> Literal["layer", "model"]:
        """Layer by layer."""
        return "layer"

    @property
    def least(self) -> int | None:
        """No lower bound: whatever is there stays."""
        return None

    def allocate(self, scores: Sequence[Scores], setting: Setting, state: None) -> list[Budget]:
        """One budget per layer: the length of every head."""
        return [Budget(entries=one.lengths.clone()) for one in scores]
