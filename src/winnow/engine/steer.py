"""Steering: changing the logits of a sample before a token is drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Steer"]


class Steer(Protocol):
    """Bends the logits of one sample: a bias, a penalty, a grammar. One object per sample."""

    def __call__(self, logits_V: Tensor, drawn: Sequence[int]) -> Tensor:
        """Logits to draw from.

        Parameters
        ----------
        logits_V : Tensor
            ``[V]`` float32 of the model; not to be written to.
        drawn : sequence of int
            Every token of this sample so far.
        """
        ...
