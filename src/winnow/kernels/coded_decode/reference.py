"""Decode attention over coded entries in plain PyTorch: decode, then attend."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.decode import reference as dense
from winnow.kernels.quantize.reference import unpack
from winnow.types import AttentionSpec, Partial, Segment

from .form import PAGE, Coded, Codes, Product

__all__ = ["coded_decode", "decoded"]


def _rounded(codes: Codes, bits: int, scale_nD: Tensor, zero_nD: Tensor | None, head: int) -> Tensor:
    """``[n, D]`` what codes say, given the scale and zero of every number."""
    numbers = unpack(codes.codes[head, : len(scale_nD)], bits).float()
    return (numbers - 128) * scale_nD if zero_nD is None else numbers * scale_nD + zero_nD


def _product(product: Product, head: int, batch_n: Tensor) -> Tensor:
    left = product.left[head, : len(batch_n)].float()
    right = product.right[head].float().unflatten(1, (-1, left.shape[1]))  # type: ignore[no-untyped-call]
    lost: Tensor = (right[batch_n] @ left.unsqueeze(2)).squeeze(2)
    return lost


def decoded(coded: Coded, head: int) -> tuple[Tensor, Tensor]:
    """K and V ``[n, D]`` float32 of the valid entries of one head."""
    n, width = int(coded.lengths[head]), coded.width
    page_n = torch.arange(n) // PAGE
    batch_n = torch.zeros(n, dtype=torch.int64)
    if coded.batches is not None:
        batch_n = coded.batches[head, : n // PAGE].long()[page_n]
    row_n = {"entry": torch.arange(n), "page": page_n, "batch": batch_n}[coded.share]

    def of_k(table: Tensor | None) -> Tensor | None:
        return None if table is None else table[head, row_n].float().expand(n, width)

    def of_v(table: Tensor | None) -> Tensor | None:
        return (
            None if table is None else table[head, :n].float().repeat_interleave(width // table.shape[2], 1)
        )

    k_scale, v_scale = of_k(coded.k.scale), of_v(coded.v.scale)
    assert k_scale is not None
    assert v_scale is not None
    k = _rounded(coded.k, coded.bits, k_scale, of_k(coded.k.zero), head)
    v = _rounded(coded.v, coded.bits, v_scale, of_v(coded.v.zero), head)
    if coded.k_product is not None and coded.v_product is not None:
        k, v = k + _product(coded.k_product, head, batch_n), v + _product(coded.v_product, head, batch_n)
    if coded.v_channel is not None:
        v = v * coded.v_channel[head, batch_n].float()
    if coded.k_extremes is not None:
        shape = (n // PAGE, 2, width)
        where = coded.k_extremes.where[head, : n // PAGE].long().view(shape)
        values = coded.k_extremes.values[head, : n // PAGE].float().view(shape)
        k = k.view(-1, PAGE, width).scatter(1, where, values).view(n, width)
    if coded.v_extremes is not None:
        v = v.scatter(1, coded.v_extremes.where[head, :n].long(), coded.v_extremes.values[head, :n].float())
    return k, v


def coded_decode(q_HD: Tensor, coded: Coded, spec: AttentionSpec, position: int) -> Partial:
    longest = int(coded.lengths.max()) if coded.heads else 0
    k, v = torch.zeros(2, coded.heads, longest, coded.width)
    for head, n in enumerate(coded.lengths.tolist()):
        k[head, :n], v[head, :n] = decoded(coded, head)
    segment = Segment(k=k, v=v, lengths=coded.lengths, start=coded.start, positions=coded.positions)
    return dense.decode(q_HD, segment, spec, position, None, False)
