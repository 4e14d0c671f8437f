"""Decode attention over coded entries in C++ (csrc/coded_decode.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.types import AttentionSpec, Partial

from .form import Coded

__all__ = ["coded_decode", "unsupported"]

_DTYPES = (torch.bfloat16, torch.float32)


def unsupported(q_HD: Tensor, coded: Coded, spec: AttentionSpec) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    if q_HD.dtype not in _DTYPES:
        return f"{q_HD.dtype} is neither bfloat16 nor float32"
    if spec.softcap is not None:
        return "logits are capped"
    if coded.k_extremes is not None and coded.k_extremes.values.dtype != q_HD.dtype:
        return "queries and extremes differ in dtype"
    return coded.unsupported


def coded_decode(q_HD: Tensor, coded: Coded, spec: AttentionSpec, position: int) -> Partial:
    """As :func:`winnow.kernels.coded_decode.coded_decode`; the operands passed :func:`unsupported`."""
    heads, width = q_HD.shape
    positions, lengths = coded.positions, coded.lengths
    group, rest = divmod(heads, coded.heads)
    if rest or width != coded.width or lengths.dtype != torch.int32:
        raise ValueError(
            f"coded_decode: queries {tuple(q_HD.shape)} do not fit {coded.heads} KV heads of {coded.width} "
            "channels with int32 lengths; pass [H * G, D]"
        )
    q_HD = q_HD.contiguous()
    out, lse = torch.empty_like(q_HD), torch.empty(1, heads)
    native = extension()
    assert native is not None
    pairs = native.coded_decode(
        q_HD.data_ptr(),
        q_HD.dtype == torch.bfloat16,
        coded.heads,
        group,
        width,
        coded.bits,
        coded.rank,
        coded.v.scale.shape[2],
        coded.addresses,
        coded.share == "entry",
        coded.share == "batch",
        lengths.data_ptr(),
        coded.k.codes.shape[1],
        position,
        coded.start,
        -1 if spec.window is None else spec.window,
        0 if positions is None else positions.data_ptr(),
        0 if positions is None else positions.stride(0),
        spec.scale,
        out.data_ptr(),
        lse.data_ptr(),
    )
    return Partial(out=out[None], lse=lse, pairs=pairs)
