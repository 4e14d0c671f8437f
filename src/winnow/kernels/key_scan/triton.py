"""Key scan on a GPU: codes are unpacked in registers and multiplied by the matrix units.

Codes are read as 32-bit words, which hold 4 or 8 dimensions of one entry. The products run in
float16: codes are integers up to 127 and a sum of at most 256 of their products stays below 2^24,
so float32 sums of them are exact.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.triton_support import (
    DTYPES,
    config,
    next_power_of_2,
    on_device,
    rounded,
    tl,
    triton,
    tuned,
)

from .codes import BLOCK, KeyCodes
from .reference import Reduction

__all__ = ["key_scan", "quantize_keys"]

ENTRIES = tl.constexpr(BLOCK)  # of a block of codes
REDUCE: dict[Reduction, int] = {"none": 0, "max": 1, "sum": 2}


@triton.jit
def _dimension(slot, word, BITS: tl.constexpr):
    """The dimension that lies at bits ``slot * BITS ..`` of each ``word``."""
    if BITS == 8:
        return word * 4 + slot
    else:
        return word * 8 + slot // 2 + slot % 2 * 4


@triton.jit
def _factor(top, limit):
    """What values of a row are multiplied by: its largest magnitude becomes ``limit``."""
    return tl.where(top > 0.0, tl.div_rn(top * 0.0 + limit, tl.where(top > 0.0, top, 1.0)), 0.0)


@triton.jit
def _quantize_keys(
    k, codes, scales, begins, ends, k_head, k_row, codes_head, scales_head, R,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (heads, tiles of entries). ``R`` words per entry."""
    head = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins + head)
    end = tl.load(ends + head)
    entry = begin + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = entry < end
    row = k + head * k_head + entry.to(tl.int64) * k_row
    d = tl.arange(0, BLOCK_D)
    values = tl.load(row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    top = tl.max(tl.abs(values.to(tl.float32)), 1)
    limit: tl.constexpr = 2 ** (BITS - 1) - 1
    by = _factor(top, limit)
    word = tl.arange(0, BLOCK_R)
    packed = tl.zeros([BLOCK_R, BLOCK_N], tl.int32)
    inside = (word < R)[:, None] & live[None, :]
    for slot in tl.static_range(32 // BITS):
        at = row[None, :] + _dimension(slot, word, BITS)[:, None]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32) * by[None, :]
        value = tl.minimum(tl.maximum(value, -1.0 * limit), 1.0 * limit)
        packed |= (rounded(value).to(tl.int32) + 2 ** (BITS - 1)) << (slot * BITS)
    block = codes + head * codes_head + (entry // ENTRIES).to(tl.int64) * (R * ENTRIES)
    tl.store(block[None, :] + word[:, None] * ENTRIES + (entry % ENTRIES)[None, :], packed, mask=inside)
    tl.store(scales + head * scales_head + entry, tl.div_rn(top, top * 0.0 + limit), mask=live)


@tuned(
    [
        config(4, 2, BLOCK_N=64),
        config(4, 2, BLOCK_N=128),
        config(8, 2, BLOCK_N=128),
        config(8, 2, BLOCK_N=256),
    ],
    key=["D", "BITS", "G", "REDUCTION"],
    small={"BLOCK_N": 32},
)
@triton.jit(do_not_specialize=["width"])
def _key_scan(
    q, codes, scales, out, lengths, q_head, codes_head, scales_head, width, R,
    D: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BITS: tl.constexpr,
    BLOCK_R: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads, tiles of entries)."""
    head = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = entry < tl.load(lengths + head)
    word = tl.arange(0, BLOCK_R)
    block = codes + head * codes_head + (entry // ENTRIES).to(tl.int64) * (R * ENTRIES)
    words = tl.load(
        block[None, :] + word[:, None] * ENTRIES + (entry % ENTRIES)[None, :],
        mask=(word < R)[:, None] & live[None, :],
        other=0,
    )
    key_scale = tl.load(scales + head * scales_head + entry, mask=live, other=0.0)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    query = q + (head * G + g) * q_head
    g_ok = (g < G)[:, None]
    values = tl.load(query[:, None] + d[None, :], mask=g_ok & (d < D)[None, :], other=0.0)
    top = tl.max(tl.abs(values.to(tl.float32)), 1)
    by = _factor(top, 127.0)
    dots = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    for slot in tl.static_range(32 // BITS):
        at = query[:, None] + _dimension(slot, word, BITS)[None, :]
        q_part = tl.load(at, mask=g_ok & (word < R)[None, :], other=0.0).to(tl.float32) * by[:, None]
        q_part = rounded(tl.minimum(tl.maximum(q_part, -127.0), 127.0)).to(tl.float16)
        code = ((words >> (slot * BITS)) & (2**BITS - 1)) - 2 ** (BITS - 1)
        dots = tl.dot(q_part, code.to(tl.float16), dots)
    scores = dots * tl.div_rn(top, top * 0.0 + 127.0)[:, None] * key_scale[None, :]

    column = entry < width
    if REDUCTION == 0:
        scores = tl.where(live[None, :], scores, float("-inf"))
        at = out + (head * G + g)[:, None] * width + entry[None, :]
        tl.store(at, scores, mask=g_ok & column[None, :])
    else:
        if REDUCTION == 1:
            reduced = tl.max(tl.where(g_ok, scores, float("-inf")), 0)
        else:
            reduced = tl.sum(tl.where(g_ok, scores, 0.0), 0)
        tl.store(out + head * width + entry, tl.where(live, reduced, float("-inf")), mask=column)


def _words(keys: KeyCodes) -> Tensor:
    """``[H, C / 16, R, 16]`` int32: the codes, four bytes at a time."""
    if not keys.codes[0].is_contiguous():
        raise ValueError("key scan: the codes of a head must be contiguous; copy them")
    return keys.codes.view(torch.int32)


def _check(x: Tensor, keys: KeyCodes) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"key scan: no Triton kernel for {x.dtype}; use float32, float16 or bfloat16")
    if x.device != keys.codes.device:
        raise ValueError(
            f"key scan: operands lie on {x.device}, codes on {keys.codes.device}; move one of them"
        )


def quantize_keys(k_HCD: Tensor, begin_H: Tensor, end_H: Tensor, into: KeyCodes) -> None:
    """As :func:`winnow.kernels.key_scan.quantize_keys`, on the device of the keys."""
    _check(k_HCD, into)
    begins, ends = begin_H.tolist(), end_H.tolist()
    counts = [end - begin for begin, end in zip(begins, ends, strict=True)]
    if min(begins) < 0 or max(ends) > min(into.capacity, k_HCD.shape[1]):
        raise ValueError("quantize_keys: the entries lie outside the reserve; grow it first")
    if max(counts) <= 0:
        return
    words, D = _words(into), into.dim
    R = D * into.bits // 32
    tile = 32
    _quantize_keys[(len(counts), triton.cdiv(max(counts), tile))](
        k_HCD, words, into.scales,
        on_device(begin_H, k_HCD.device, torch.int32), on_device(end_H, k_HCD.device, torch.int32),
        k_HCD.stride(0), k_HCD.stride(1), words.stride(0), into.scales.stride(0), R,
        D=D, BLOCK_D=next_power_of_2(D), BITS=into.bits, BLOCK_R=next_power_of_2(R), BLOCK_N=tile,
        enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of the product
    )  # fmt: skip


def key_scan(q_HD: Tensor, keys: KeyCodes, lengths_H: Tensor, reduce: Reduction, width: int) -> Tensor:
    """As :func:`winnow.kernels.key_scan.key_scan`, on the device of the queries."""
    _check(q_HD, keys)
    lengths = lengths_H.tolist()
    if min(lengths) < 0 or max(lengths) > min(keys.capacity, width):
        raise ValueError("key_scan: a length lies outside the reserve")
    heads, rows = keys.codes.shape[0], q_HD.shape[0]
    out = torch.empty(rows if reduce == "none" else heads, width, device=q_HD.device)
    if not out.numel():
        return out
    q_HD = q_HD if q_HD.stride(1) == 1 else q_HD.contiguous()
    words, D, group = _words(keys), keys.dim, rows // heads
    R = D * keys.bits // 32
    _key_scan[lambda meta: (heads, triton.cdiv(width, meta["BLOCK_N"]))](
        q_HD, words, keys.scales, out, on_device(lengths_H, q_HD.device, torch.int32),
        q_HD.stride(0), words.stride(0), keys.scales.stride(0), width, R,
        D=D, BLOCK_D=next_power_of_2(D), G=group, BLOCK_G=max(next_power_of_2(group), 16), BITS=keys.bits,
        BLOCK_R=max(next_power_of_2(R), 16), REDUCTION=REDUCE[reduce], enable_fp_fusion=False,
    )  # fmt: skip
    return out
