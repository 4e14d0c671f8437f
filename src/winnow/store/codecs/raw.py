"""Entries as the model computed them."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.store.codecs.protocol import Decoded, Plane

__all__ = ["Raw"]


class Raw(Decoded):
    """K and V in the model's own type."""

    name = "raw"

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return (
            Plane(name="k", dtype=dtype, width=head_dim),
            Plane(name="v", dtype=dtype, width=head_dim),
        )

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        return k, v

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = rows
        return k, v
