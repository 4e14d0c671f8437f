"""The quantised copy of the keys that a scan reads, and how it lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BLOCK", "Bits", "KeyCodes"]

Bits = Literal[4, 8]

BLOCK = 16
"""Entries whose codes are interleaved, so that one instruction advances 16 logits."""


@dataclass(frozen=True, kw_only=True)
class KeyCodes:
    """Symmetric integer codes of keys, one scale per entry, in a growing reserve.

    Entry ``e`` of head ``h`` here is entry ``e`` of head ``h`` in the segment that it copies; which
    entries are valid is the caller's to know. ``k[h, e, d]`` is about ``code * scales[h, e]`` with
    ``code`` in -127 .. 127 (8 bits) or -7 .. 7 (4 bits), stored with an offset of 128 or 8.

    Attributes
    ----------
    codes : Tensor
        ``[H, C / 16, R, 64]`` uint8. With 8 bits ``R = D / 4``, and byte ``4 * i + j`` of row ``r``
        is dimension ``4 * r + j`` of entry ``i`` of the block. With 4 bits ``R = D / 8``; its low
        half is dimension ``8 * r + j`` and its high half dimension ``8 * r + 4 + j``.
    scales : Tensor
        ``[H, C]`` float32.
    bits : 4 or 8
    dim : int
        ``D``, a multiple of 16 up to 256.
    """

    codes: Tensor
    scales: Tensor
    bits: Bits
    dim: int

    @classmethod
    def empty(
        cls, heads: int, capacity: int, dim: int, bits: Bits, device: torch.device | str = "cpu"
    ) -> KeyCodes:
        """A reserve for ``capacity`` entries per head (rounded up to whole blocks), not filled."""
        if bits not in (4, 8):
            raise ValueError(f"key codes have 4 or 8 bits, not {bits}; choose one of them")
        if dim % 16 or not 16 <= dim <= 256:
            raise ValueError(f"key codes need a head size that is a multiple of 16 up to 256, not {dim}")
        blocks = -(-capacity // BLOCK)
        return cls(
            codes=torch.empty(heads, blocks, dim * bits // 32, 4 * BLOCK, dtype=torch.uint8, device=device),
            scales=torch.empty(heads, blocks * BLOCK, device=device),
            bits=bits,
            dim=dim,
        )

    @property
    def capacity(self) -> int:
        """Entries per head that the reserve holds."""
        return self.scales.shape[1]

    @property
    def bytes_per_entry(self) -> int:
        """Bytes that scanning one entry of one head moves."""
        return self.dim * self.bits // 8 + self.scales.element_size()

    def grown(self, capacity: int) -> KeyCodes:
        """The same codes in a reserve for at least ``capacity`` entries; itself where that fits already."""
        if capacity <= self.capacity:
            return self
        more = KeyCodes.empty(self.codes.shape[0], capacity, self.dim, self.bits, self.codes.device)
        more.codes[:, : self.codes.shape[1]] = self.codes
        more.scales[:, : self.capacity] = self.scales
        return more
