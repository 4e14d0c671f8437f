"""Key scan in C++ (csrc/key_scan.cpp): validates, prepares addresses, calls."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension

from .codes import KeyCodes
from .reference import Reduction

__all__ = ["key_scan", "quantize_keys", "unsupported"]

_REDUCE: dict[Reduction, int] = {"none": 0, "max": 1, "sum": 2}


def unsupported(x: Tensor, keys: KeyCodes) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        return f"{x.dtype} is neither bfloat16 nor float32"
    if not keys.codes[0].is_contiguous() or keys.scales.stride(1) != 1:
        return "the codes of a head are not contiguous"
    return ""


def _per_head(t: Tensor, heads: int, name: str) -> Tensor:
    if t.dtype != torch.int32 or t.shape != (heads,) or not t.is_contiguous():
        raise ValueError(f"key scan: {name} must be a contiguous int32 tensor of {heads} heads; convert it")
    return t


def _address(keys: KeyCodes) -> tuple[int, int, int, int, int, int, int, int]:
    codes, scales = keys.codes, keys.scales
    heads, capacity = scales.shape
    return (
        codes.data_ptr(),
        codes.stride(0),
        scales.data_ptr(),
        scales.stride(0),
        capacity,
        heads,
        keys.dim,
        keys.bits,
    )


def quantize_keys(k_HCD: Tensor, begin_H: Tensor, end_H: Tensor, into: KeyCodes) -> None:
    """As :func:`winnow.kernels.key_scan.quantize_keys`; the operands passed :func:`unsupported`."""
    if k_HCD.stride(2) != 1:
        raise ValueError("quantize_keys: the last dimension of the keys must be contiguous; copy them")
    heads = k_HCD.shape[0]
    native = extension()
    assert native is not None
    native.quantize_keys(
        *_address(into),
        k_HCD.data_ptr(),
        k_HCD.stride(0),
        k_HCD.stride(1),
        k_HCD.shape[1],
        k_HCD.dtype == torch.bfloat16,
        _per_head(begin_H, heads, "begin").data_ptr(),
        _per_head(end_H, heads, "end").data_ptr(),
    )


def key_scan(q_HD: Tensor, keys: KeyCodes, lengths_H: Tensor, reduce: Reduction, width: int) -> Tensor:
    """As :func:`winnow.kernels.key_scan.key_scan`; the operands passed :func:`unsupported`."""
    rows = q_HD.shape[0]
    heads = keys.codes.shape[0]
    q_HD = q_HD.contiguous()
    scores = torch.empty(rows if reduce == "none" else heads, width)
    native = extension()
    assert native is not None
    native.key_scan(
        *_address(keys),
        q_HD.data_ptr(),
        q_HD.dtype == torch.bfloat16,
        rows // heads,
        _per_head(lengths_H, heads, "lengths").data_ptr(),
        _REDUCE[reduce],
        scores.data_ptr(),
        width,
    )
    return scores
