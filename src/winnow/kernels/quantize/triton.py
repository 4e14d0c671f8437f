"""Quantisation on a GPU, bit for bit as the reference.

A program holds whole groups, so that values are read once: some groups of channels (axis ``token``)
or one group of tokens by some channels (axis ``channel``). Scales travel as the 16 bits of a
bfloat16, because rounding them outwards is a matter of bits.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.triton_support import DTYPES, next_power_of_2, rounded, tl, triton

from .form import Axis, Quantized, levels

__all__ = ["dequantize", "quantize"]

TILE = 4096  # values that a program holds
LEAST_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _value(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n", "total", "top_code"])
def _quantize(
    x, codes, scales, zeros, outer_stride, row_stride, n, D, total, group, top_code,
    BITS: tl.constexpr, CHANNEL: tl.constexpr, SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Axis token: a tile's rows are groups. Axis channel: its rows are the tokens of one group."""
    PER: tl.constexpr = 8 // BITS
    along: tl.constexpr = 0 if CHANNEL else 1  # the dimension of the tile that shares a scale
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    byte = tl.arange(0, COLUMNS // PER)
    block = tl.program_id(0).to(tl.int64)
    if CHANNEL:
        token = block * group + row  # over all planes: groups never cross a plane
        channel = tl.program_id(1) * COLUMNS + column
        inside = (row < group)[:, None] & (channel < D)[None, :]
        at = (token // n * outer_stride + token % n * row_stride)[:, None] + channel[None, :]
        byte_at = token[:, None] * (D // PER) + (tl.program_id(1) * (COLUMNS // PER) + byte)[None, :]
        byte_ok = (row < group)[:, None] & (tl.program_id(1) * COLUMNS + byte * PER < D)[None, :]
        scale_at = block * D + channel
        scale_ok = channel < D
    else:
        number = block * ROWS + row  # of the group
        per_token = D // group
        token = number // per_token
        inside = (number < total)[:, None] & (column < group)[None, :]
        first = token // n * outer_stride + token % n * row_stride + number % per_token * group
        at = first[:, None] + column[None, :]
        byte_at = number[:, None] * (group // PER) + byte[None, :]
        byte_ok = (number < total)[:, None] & (byte * PER < group)[None, :]
        scale_at = number
        scale_ok = number < total
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, value, float("inf")), along)
    high = tl.max(tl.where(inside, value, float("-inf")), along)
    if SYMMETRIC:
        reach = tl.maximum(-low, high)
        zero = reach * 0.0
    else:
        low_bits = _bits(low)
        zero = _value((low_bits + tl.where(low_bits < 0, 65535, 0)) & -65536)  # rounded down
        reach = high - zero
    scale = tl.maximum(tl.div_rn(reach, reach * 0.0 + top_code), LEAST_SCALE)
    scale = _value((_bits(scale) + 65535) & -65536)  # rounded up
    inverse = tl.where(reach > 0.0, tl.div_rn(scale * 0.0 + 1.0, scale), 0.0)
    scale = tl.where(reach > 0.0, scale, 0.0)
    code = rounded((value - tl.expand_dims(zero, along)) * tl.expand_dims(inverse, along)).to(tl.int32)
    if SYMMETRIC:
        code += 2 ** (BITS - 1)
    code = tl.where(inside, code, 0) & (2**BITS - 1)
    parts = tl.reshape(code, [ROWS, COLUMNS // PER, PER]) << (tl.arange(0, PER) * BITS)[None, None, :]
    tl.store(codes + byte_at, tl.sum(parts, 2).to(tl.uint8), mask=byte_ok)
    tl.store(scales + scale_at, (_bits(scale) >> 16).to(tl.int16), mask=scale_ok)
    if not SYMMETRIC:
        tl.store(zeros + scale_at, (_bits(zero) >> 16).to(tl.int16), mask=scale_ok)


@triton.jit
def _from_bfloat16(bits):
    return _value(bits.to(tl.int32) << 16)


@triton.jit(do_not_specialize=["n", "total"])
def _dequantize(
    codes, scales, zeros, out, codes_outer, codes_row, scales_outer, scales_row, zeros_outer, zeros_row,
    out_outer, out_row, n, D, total, group,
    BITS: tl.constexpr, CHANNEL: tl.constexpr, SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of tokens, tiles of channels)."""
    PER: tl.constexpr = 8 // BITS
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outer, row = token // n, token % n
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    byte = tl.program_id(1) * (COLUMNS // PER) + tl.arange(0, COLUMNS // PER)
    packed = tl.load(
        codes + (outer * codes_outer + row * codes_row)[:, None] + byte[None, :],
        mask=(token < total)[:, None] & (byte * PER < D)[None, :],
        other=0,
    ).to(tl.int32)
    parts = packed[:, :, None] >> (tl.arange(0, PER) * BITS)[None, None, :] & (2**BITS - 1)
    code = tl.reshape(parts, [ROWS, COLUMNS]).to(tl.float32)
    inside = (token < total)[:, None] & (channel < D)[None, :]
    if CHANNEL:
        scale_row, scale_column = row // group, channel
    else:
        scale_row, scale_column = row, channel // group
    scale = _from_bfloat16(
        tl.load(
            scales + (outer * scales_outer + scale_row * scales_row)[:, None] + scale_column[None, :],
            mask=inside,
            other=0,
        )
    )
    if SYMMETRIC:
        value = (code - 2 ** (BITS - 1)) * scale
    else:
        zero = _from_bfloat16(
            tl.load(
                zeros + (outer * zeros_outer + scale_row * zeros_row)[:, None] + scale_column[None, :],
                mask=inside,
                other=0,
            )
        )
        value = code * scale + zero
    tl.store(
        out + (outer * out_outer + row * out_row)[:, None] + channel[None, :],
        value.to(out.dtype.element_ty),
        mask=inside,
    )


def _planes(x: Tensor) -> Tensor:
    """``[outer, rows, width]`` with a contiguous last dimension; a copy where views do not suffice."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def quantize(x: Tensor, bits: int, axis: Axis, group: int, symmetric: bool) -> Quantized:
    """As :func:`winnow.kernels.quantize.quantize`, on the device of ``x``."""
    if x.dtype not in DTYPES:
        raise ValueError(f"quantize: no Triton kernel for {x.dtype}; use backend='reference'")
    if axis == "token" and group * bits % 8:
        raise ValueError(
            f"quantize: {group} channels of {bits} bits end inside a byte, which the Triton kernel cannot "
            "write; use larger groups or backend='reference'"
        )
    *lead, n, D = x.shape
    channel = axis == "channel"
    scale_shape = (*lead, n // group, D) if channel else (*lead, n, D // group)
    codes = torch.empty(*lead, n, D * bits // 8, dtype=torch.uint8, device=x.device)
    scale = torch.empty(scale_shape, dtype=torch.bfloat16, device=x.device)
    zero = None if symmetric else torch.empty_like(scale)
    made = Quantized(codes=codes, scale=scale, zero=zero, bits=bits, axis=axis, group=group)
    if not x.numel():
        return made
    planes = _planes(x)
    size = next_power_of_2(group)
    if channel:
        columns = min(next_power_of_2(D), max(TILE // size, 16))
        total = x.numel() // (group * D)
        rows, grid = size, (total, triton.cdiv(D, columns))
    else:
        rows, columns, total = max(TILE // size, 1), size, scale.numel()
        grid = (triton.cdiv(total, rows), 1)
    columns = max(columns, 8 // bits)
    _quantize[grid](
        planes, codes, scale.view(torch.int16), (scale if zero is None else zero).view(torch.int16),
        planes.stride(0), planes.stride(1), n, D, total, group, levels(bits, symmetric),
        BITS=bits, CHANNEL=channel, SYMMETRIC=symmetric, ROWS=rows, COLUMNS=columns,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
    )  # fmt: skip
    return made


def dequantize(q: Quantized, out: Tensor) -> None:
    """Write the values of ``q`` into ``out``, on its device."""
    if not out.numel():
        return
    codes, scale = _planes(q.codes), _planes(q.scale.view(torch.int16))
    zero = scale if q.zero is None else _planes(q.zero.view(torch.int16))
    planes = _planes(out)
    _, n, D = planes.shape
    total = out.numel() // D
    columns = max(min(next_power_of_2(D), 256), 8 // q.bits)
    rows = max(TILE // columns, 1)
    _dequantize[(triton.cdiv(total, rows), triton.cdiv(D, columns))](
        codes, scale, zero, planes, codes.stride(0), codes.stride(1), scale.stride(0), scale.stride(1),
        zero.stride(0), zero.stride(1), planes.stride(0), planes.stride(1), n, D, total, q.group,
        BITS=q.bits, CHANNEL=q.axis == "channel", SYMMETRIC=q.zero is None, ROWS=rows, COLUMNS=columns,
        enable_fp_fusion=False,
    )  # fmt: skip
    if planes.data_ptr() != out.data_ptr():
        out.copy_(planes.view(out.shape))
