"""Entries in 8, 4 or 2 bits, with whatever a codec keeps beside the codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

__all__ = ["PAGE", "Coded", "Codes", "Extremes", "Product"]

PAGE = 64
"""Entries of a page."""

_MOST = 256  # channels of a row in the native kernel, those of the low rank included


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Keys or values as ``code * scale + zero``, or ``(code - 128) * scale`` without zeros.

    Attributes
    ----------
    codes : Tensor
        ``[H, C, D * bits / 8]`` uint8, the first channel of a byte in its low bits.
    scale, zero : Tensor
        ``[H, rows, width]`` bfloat16; ``zero`` is None in the symmetric form, of 8 bits only.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Product:
    """What rounding lost, at low rank.

    Attributes
    ----------
    left : Tensor
        ``[H, C, r]`` bfloat16.
    right : Tensor
        ``[H, B, D * r]`` bfloat16, the rank running fastest.
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """Values that are kept as they are, in place of what everything else says.

    Attributes
    ----------
    values : Tensor
        Of K ``[H, P, 2 * D]``: the largest and the smallest value of every channel of a page. Of V
        ``[H, C, 2]``: those of every entry. In the dtype of the queries.
    where : Tensor
        As ``values``, uint8: the entry of the page, or the channel, that has it. Where both are in one place
        they are equal.
    """

    values: Tensor
    where: Tensor


@dataclass(frozen=True, kw_only=True)
class Coded:
    """Stored entries of one layer; every head holds whole pages of :data:`PAGE`.

    Pages that were encoded together are a batch: they share the rows of some tables.

    Attributes
    ----------
    bits : {8, 4, 2}
    k, v : Codes
        V's scales are ``[H, C, N]``: by entry and group of ``D / N`` channels. K's are shared as ``share``
        says: ``[H, C, 1]`` by ``"entry"`` (symmetric only), ``[H, P, D]`` by channel of a ``"page"``,
        ``[H, B, D]`` by channel of a ``"batch"``.
    share : {"entry", "page", "batch"}
    v_channel : Tensor or None
        ``[H, B, D]`` bfloat16 factors of V's channels.
    k_product, v_product : Product or None
        Both or none, of one rank.
    k_extremes, v_extremes : Extremes or None
    batches : Tensor or None
        ``[H, P]`` int32 batch of every page; None where there is one.
    lengths, start, positions
        As in :class:`winnow.types.Segment`.
    """

    bits: int
    k: Codes
    v: Codes
    share: Literal["entry", "page", "batch"]
    v_channel: Tensor | None = None
    k_product: Product | None = None
    v_product: Product | None = None
    k_extremes: Extremes | None = None
    v_extremes: Extremes | None = None
    batches: Tensor | None = None
    lengths: Tensor
    start: int = 0
    positions: Tensor | None = None

    @property
    def heads(self) -> int:
        """KV heads ``H``."""
        return self.k.codes.shape[0]

    @property
    def width(self) -> int:
        """Channels ``D``."""
        return self.k.codes.shape[2] * 8 // self.bits

    @property
    def rank(self) -> int:
        """Rank of the products, 0 without them."""
        return 0 if self.k_product is None else self.k_product.left.shape[2]

    @cached_property
    def tables(self) -> tuple[Tensor | None, ...]:
        """Every table in the order of csrc/coded_decode.h."""
        k_product, v_product = self.k_product, self.v_product
        k_extremes, v_extremes = self.k_extremes, self.v_extremes
        return (
            self.k.codes,
            self.k.scale,
            self.k.zero,
            self.v.codes,
            self.v.scale,
            self.v.zero,
            self.v_channel,
            None if k_product is None else k_product.left,
            None if k_product is None else k_product.right,
            None if v_product is None else v_product.left,
            None if v_product is None else v_product.right,
            None if k_extremes is None else k_extremes.values,
            None if k_extremes is None else k_extremes.where,
            None if v_extremes is None else v_extremes.values,
            None if v_extremes is None else v_extremes.where,
            None if self.batches is None else self.batches.unsqueeze(2),
        )

    @cached_property
    def unsupported(self) -> str:
        """Why the native kernel cannot read this form; empty where it can. Looked up once, as a step asks."""
        width, rank, groups = self.width, self.rank, self.v.scale.shape[2]
        if width % 16 or width + -(-rank // 16) * 16 > _MOST:
            return f"head size {width} at rank {rank} is not a multiple of 16 within {_MOST} channels"
        if width // groups % 16:
            return f"{groups} groups of {width} channels are not multiples of 16"
        if (self.k.zero is None) != (self.share == "entry") or (self.v.zero is None and self.bits != 8):
            return "only scales by entry of 8 bits go without zeros"
        if any(table is not None and table.shape[2] > 1 and table.stride(2) != 1 for table in self.tables):
            return "the last dimension of a table is not contiguous"
        return ""

    @cached_property
    def addresses(self) -> tuple[tuple[int, int, int], ...]:
        """Address and strides of the tables, looked up once: a step reads them in every layer."""
        return tuple(
            (0, 0, 0) if table is None else (table.data_ptr(), table.stride(0), table.stride(1))
            for table in self.tables
        )
