"""Few bits, a low-rank matrix for what rounding lost, and the largest values exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from winnow.kernels.coded_decode import Coded, Extremes, Product
from winnow.store.codecs.coded import ReadAsCodes
from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.kivi import Kivi
from winnow.store.codecs.protocol import ENTRIES, Plane

__all__ = ["Gear"]

_ROUNDS = 3  # of the power iteration


class Gear(ReadAsCodes):
    """``X ~ Q(X - S) + P R^T + S``: quantised, low rank, sparse (the form of GEAR, arXiv 2403.05527).

    Of K the largest and the smallest value of every channel of a page, of V those of every token, are
    taken out, kept as they are, and replaced by the mean of their vector; the rest is quantised as KIVI
    does, and what that loses of the pages that are encoded together is kept at rank ``rank``.

    Parameters
    ----------
    bits : {2, 4}
    rank : int
        Of the residual, at least 1.
    outliers : bool
        False keeps none (the paper's GEAR-L).
    """

    def __init__(self, bits: Literal[2, 4], rank: int, *, outliers: bool = True):
        if rank < 1:
            raise ValueError("codec 'gear': a residual of rank 0 is the codec 'int4' or 'int2'; use that")
        self.bits = bits
        self.rank = rank
        self.outliers = outliers
        self.name = f"gear{'' if outliers else '-l'}{bits}:{rank}"
        self._plain = Kivi.of(bits)

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        if head_dim > 256:
            raise ValueError(
                f"codec {self.name!r}: a head has {head_dim} channels, at most 256 can be numbered"
            )
        planes = list(self._plain.planes(head_dim, dtype))
        for of in "kv":
            planes += [
                Plane(name=f"{of}_left", dtype=torch.bfloat16, width=self.rank),
                Plane(
                    name=f"{of}_right",
                    dtype=torch.bfloat16,
                    width=self.rank * head_dim,
                    entries=ENTRIES,
                    once=True,
                ),
            ]
        if self.outliers:
            planes += [
                Plane(name="k_extremes", dtype=dtype, width=2 * head_dim, entries=ENTRIES),
                Plane(name="k_where", dtype=torch.uint8, width=2 * head_dim, entries=ENTRIES),
                Plane(name="v_extremes", dtype=dtype, width=2),
                Plane(name="v_where", dtype=torch.uint8, width=2),
            ]
        return tuple(planes)

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        k_PED, v_nD = k.float().view(-1, ENTRIES, k.shape[1]), v.float()
        sparse: tuple[Tensor, ...] = ()
        if self.outliers:
            k_PED, k_ext, k_at = _taken_out(k_PED, 1)
            v_nD, v_ext, v_at = _taken_out(v_nD, 1)
            sparse = (k_ext.flatten(1).to(k.dtype), k_at.flatten(1), v_ext.to(v.dtype), v_at)
        k_nD = k_PED.flatten(0, 1)
        plain = self._plain.encode(k_nD, v_nD)
        k_near, v_near = self._plain.decode(plain, torch.float32)
        low_rank: list[Tensor] = []
        for lost in (k_nD - k_near, v_nD - v_near):
            left, right = _low_rank(lost, self.rank)
            low_rank += [left.bfloat16(), right.bfloat16().flatten()[None]]
        return (*plain, *low_rank, *sparse)

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        plain, rest = rows[:6], rows[6:]
        k, v = self._plain.decode(plain, torch.float32)
        k = k + _product(rest[0], rest[1])
        v = v + _product(rest[2], rest[3])
        if self.outliers:
            k_ext, k_at, v_ext, v_at = rest[4:]
            size = k.shape[-1]
            pages = k.unflatten(-2, (-1, ENTRIES))  # type: ignore[no-untyped-call]
            shape = (*k_at.shape[:-1], 2, size)
            pages = pages.scatter(-2, k_at.long().view(shape), k_ext.float().view(shape))
            k = pages.flatten(-3, -2)
            v = v.scatter(-1, v_at.long(), v_ext.float())
        return k.to(dtype), v.to(dtype)

    def coded(self, segment: EncodedSegment) -> Coded:
        k_left, k_right, v_left, v_right, *sparse = segment.rows[6:]
        plain = replace(
            self._plain.coded(segment),
            k_product=Product(left=k_left, right=k_right),
            v_product=Product(left=v_left, right=v_right),
            batches=segment.batches,
        )
        if not sparse:
            return plain
        k_values, k_where, v_values, v_where = sparse
        return replace(
            plain,
            k_extremes=Extremes(values=k_values, where=k_where),
            v_extremes=Extremes(values=v_values, where=v_where),
        )


def _taken_out(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest and smallest value along ``dim``, where they were, and ``x`` with the mean in their place."""
    high, low = x.max(dim, keepdim=True), x.min(dim, keepdim=True)
    values = torch.cat([high.values, low.values], dim)
    where = torch.cat([high.indices, low.indices], dim)
    mean = x.mean(dim, keepdim=True).expand_as(values)
    return x.scatter(dim, where, mean), values, where.to(torch.uint8)


def _low_rank(x_nD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``P [n, r]`` and ``R [D, r]``, ``P R^T`` close to ``x``: a power iteration from a fixed start."""
    start = torch.Generator().manual_seed(0)
    right = torch.randn(x_nD.shape[1], rank, generator=start).to(x_nD.device)
    for _ in range(_ROUNDS):
        right = torch.linalg.qr(right).Q
        left = torch.linalg.qr(x_nD @ right).Q
        right = x_nD.T @ left
    return left, right


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``P R^T`` page by page: ``[..., n, r]`` and ``[..., n / ENTRIES, D r]`` to ``[..., n, D]``."""
    rank = left.shape[-1]
    pages = left.float().unflatten(-2, (-1, ENTRIES))  # type: ignore[no-untyped-call]
    factor = right.float().unflatten(-1, (-1, rank))  # type: ignore[no-untyped-call]
    product: Tensor = (pages @ factor.transpose(-1, -2)).flatten(-3, -2)
    return product
