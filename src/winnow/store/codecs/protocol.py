"""What the store expects of a codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ENTRIES", "Codec", "Plane", "bytes_per_entry"]

ENTRIES = 64
"""Entries of a page: the unit that is encoded, demoted and moved."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One table that a codec keeps beside the others.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
    width : int
        Elements of a row.
    entries : int
        Entries that share a row: 1, or :data:`ENTRIES` for what a page has once.
    """

    name: str
    dtype: torch.dtype
    width: int
    entries: int = 1


class Codec(Protocol):
    """How entries are stored. Stateless; one instance per process."""

    name: str

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        """The tables that hold entries of ``head_dim`` values of ``dtype``.

        Raises
        ------
        ValueError
            If the codec cannot store entries of this size.
        """
        ...

    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Rows ``[..., n / entries, width]`` for ``[..., n, D]`` K and V; ``n`` is whole pages."""
        ...

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V ``[..., n, D]`` in ``dtype``."""
        ...


def bytes_per_entry(codec: Codec, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that one entry (K and V of one head) takes, rounded up to whole bytes."""
    page = sum(p.width * p.dtype.itemsize * (ENTRIES // p.entries) for p in codec.planes(head_dim, dtype))
    return -(-page // ENTRIES)
