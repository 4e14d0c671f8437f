"""Quantisation in C++ (csrc/quantize.cpp)."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from winnow.kernels.backend import extension

from .form import Axis, Quantized, shapes

__all__ = ["dequantize", "dequantize_unsupported", "quantize", "quantize_unsupported"]

_TYPES = (torch.float32, torch.bfloat16)
_NONE = (0, 0, 0)


def _unsupported(dtype: torch.dtype, *tensors: Tensor | None) -> str:
    if dtype not in _TYPES:
        return f"values are {dtype}, not float32 or bfloat16"
    if sys.byteorder != "little":
        return "the processor is big-endian"
    if any(t is not None and t.shape[-1] > 1 and t.stride(-1) != 1 for t in tensors):
        return "the last dimension is not contiguous"
    return ""


def quantize_unsupported(x: Tensor, out: Quantized | None) -> str:
    """Why the native kernel cannot quantise ``x`` (into ``out``); empty where it can."""
    if out is None:
        return _unsupported(x.dtype, x)
    for t in (out.codes, out.scale, out.zero):
        if t is not None and t.dim() > 3 and not t.is_contiguous():
            return "out has more than three dimensions and is not contiguous"
    return _unsupported(x.dtype, x, out.codes, out.scale, out.zero)


def dequantize_unsupported(q: Quantized, dtype: torch.dtype, out: Tensor | None) -> str:
    """Why the native kernel cannot dequantise ``q`` (into ``out``); empty where it can."""
    return _unsupported(dtype, q.codes, q.scale, q.zero, out)


def _plane(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _three(x: Tensor) -> Tensor:
    """``[outer, rows, width]``: a view, or a copy where the leading dimensions do not fold."""
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])


def _empty(x: Tensor, bits: int, axis: Axis, group: int, symmetric: bool) -> Quantized:
    of_codes, of_scale = shapes(x.shape, bits, axis, group)
    scale = torch.empty(of_scale, dtype=torch.bfloat16)
    return Quantized(
        codes=torch.empty(of_codes, dtype=torch.uint8),
        scale=scale,
        zero=None if symmetric else torch.empty_like(scale),
        bits=bits,
        axis=axis,
        group=group,
    )


def quantize(
    x: Tensor, bits: int, axis: Axis, group: int, symmetric: bool, out: Quantized | None
) -> Quantized:
    out = _empty(x, bits, axis, group, symmetric) if out is None else out
    if x.numel():
        x_onw, native = _three(x), extension()
        assert native is not None
        native.quantize(
            _plane(x_onw),
            _plane(_three(out.codes)),
            _plane(_three(out.scale)),
            _NONE if out.zero is None else _plane(_three(out.zero)),
            *x_onw.shape,
            group,
            bits,
            axis == "channel",
            x.dtype == torch.bfloat16,
        )
    return out


def dequantize(q: Quantized, out: Tensor) -> None:
    if not out.numel():
        return
    # Views of these stay alive until the call returns.
    out_onw, codes, scale = _three(out), _three(q.codes), _three(q.scale)
    zero = None if q.zero is None else _three(q.zero)
    native = extension()
    assert native is not None
    native.dequantize(
        _plane(out_onw),
        _plane(codes),
        _plane(scale),
        _NONE if zero is None else _plane(zero),
        *out_onw.shape,
        q.group,
        q.bits,
        q.axis == "channel",
        out.dtype == torch.bfloat16,
    )
    if out_onw.data_ptr() != out.data_ptr():
        out.copy_(out_onw.view(out.shape))
