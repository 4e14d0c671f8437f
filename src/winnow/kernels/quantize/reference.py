"""Quantisation in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from .form import Axis, Quantized, levels

__all__ = ["dequantize", "pack", "quantize", "unpack"]

_LEAST_SCALE = 2.0**-100  # its inverse is finite


def pack(codes: Tensor, bits: int) -> Tensor:
    """``[..., D]`` codes to ``[..., D * bits / 8]`` bytes, the first of a byte in its low bits."""
    parts = codes.to(torch.uint8).reshape(*codes.shape[:-1], -1, 8 // bits)
    packed = torch.zeros_like(parts[..., 0])
    for i in range(8 // bits):
        packed |= parts[..., i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """``[..., D]`` uint8 codes of packed bytes."""
    parts = [packed >> (bits * i) & ((1 << bits) - 1) for i in range(8 // bits)]
    return torch.stack(parts, -1).flatten(-2)


def _floor_bf16(x: Tensor) -> Tensor:
    """Largest bfloat16 that is not above ``x`` (float32): cut the mantissa, away from zero below it."""
    word = x.contiguous().view(torch.int32)
    return ((word + (word < 0).int() * 0xFFFF) & ~0xFFFF).view(torch.float32)


def _ceil_bf16(x: Tensor) -> Tensor:
    """Smallest bfloat16 that is not below ``x >= 0`` (float32)."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _group(x: Tensor, axis: Axis, group: int) -> tuple[Tensor, int]:
    """Split the grouped dimension in two; return the dimension that a scale is shared along."""
    *lead, n, width = x.shape
    if axis == "token":
        return x.reshape(*lead, n, width // group, group), -1
    return x.reshape(*lead, n // group, group, width), -2


def quantize(x: Tensor, bits: int, axis: Axis, group: int, symmetric: bool) -> Quantized:
    grouped, along = _group(x.float(), axis, group)
    low, high = grouped.amin(along), grouped.amax(along)
    zero = torch.zeros_like(low) if symmetric else _floor_bf16(low)
    reach = torch.maximum(-low, high) if symmetric else high - zero
    # Zero and scale are rounded outwards before they are used, so that every value lies within the
    # codes and the error is at most half a scale.
    scale = _ceil_bf16((reach / levels(bits, symmetric)).clamp(min=_LEAST_SCALE))
    # A group whose values all equal its zero has scale 0 and codes 0.
    scale = torch.where(reach > 0, scale, 0.0)
    inverse = torch.where(reach > 0, 1.0 / scale, 0.0)
    offset = 1 << (bits - 1) if symmetric else 0
    codes = torch.round((grouped - zero.unsqueeze(along)) * inverse.unsqueeze(along)) + offset
    return Quantized(
        codes=pack(codes.reshape(x.shape), bits),
        scale=scale.bfloat16(),
        zero=None if symmetric else zero.bfloat16(),
        bits=bits,
        axis=axis,
        group=group,
    )


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    codes = unpack(q.codes, q.bits).float()
    grouped, along = _group(codes, q.axis, q.group)
    if q.zero is None:
        values = (grouped - (1 << (q.bits - 1))) * q.scale.float().unsqueeze(along)
    else:
        values = grouped * q.scale.float().unsqueeze(along) + q.zero.float().unsqueeze(along)
    return values.reshape(codes.shape).to(dtype)
