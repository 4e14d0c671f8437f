"""Attention mass on a GPU: one program per query head and tile of entries.

A program owns its columns, so nothing is added atomically. It walks the queries that see some entry of
its tile; where positions ascend, those that see *every* entry are one interval, inside which no mask is
computed.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.triton_support import (
    LOG2E,
    check_operands,
    config,
    count_below,
    next_power_of_2,
    on_device,
    ptr,
    soft_capped,
    tl,
    triton,
    tuned,
)
from winnow.types import AttentionSpec, Segment

__all__ = ["mass"]

SHARED_BYTES = 227 * 1024  # of one program on sm_90; Triton skips what does not fit elsewhere


def _fits(c: Any, call: Mapping[str, Any]) -> bool:
    """Whether a tile suits a call: the registers in float32, the card's shared memory otherwise."""
    block_m, block_n, D = c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], call["D"]
    if call["q"].dtype == torch.float32:  # outside the matrix units
        return bool(block_m * block_n * D <= 32 * 16 * 128)
    return bool(2 * D * (block_n + c.num_stages * block_m) <= SHARED_BYTES)


@tuned(
    [
        config(8, 3, BLOCK_M=128, BLOCK_N=128),
        config(4, 3, BLOCK_M=64, BLOCK_N=128),
        config(4, 3, BLOCK_M=128, BLOCK_N=64),
        config(4, 3, BLOCK_M=64, BLOCK_N=64),
        config(4, 2, BLOCK_M=32, BLOCK_N=64),
        config(4, 2, BLOCK_M=32, BLOCK_N=32),
        config(4, 2, BLOCK_M=16, BLOCK_N=16),
    ],
    key=["D", "G", "SIZE", "MODEL_WINDOW", "BIAS", "SOFTCAP", "POSITIONS"],
    small={"BLOCK_M": 32, "BLOCK_N": 32},
    keep=_fits,
)
@triton.jit(do_not_specialize=["T", "S_out", "start", "window"])
def _mass(
    q, k, lse, out, query_positions, lengths, positions, bias,
    T, S_out, q_row, q_head, k_row, k_head, lse_row, lse_head, positions_head, bias_head,
    start, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr,
    MODEL_WINDOW: tl.constexpr, POSITIONS: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of entries, query heads)."""
    first = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1)
    kv = head // G
    S = tl.load(lengths + kv)
    entry = first + tl.arange(0, BLOCK_N)
    live = entry < S
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N], tl.float32)
    if first < S:
        last = tl.minimum(first + BLOCK_N, S) - 1
        if POSITIONS:
            positions += kv.to(tl.int64) * positions_head
            position = tl.load(positions + entry, mask=live, other=0)
            low, high = tl.load(positions + first), tl.load(positions + last)
        else:
            position = start + entry
            low, high = start + first, start + last
        # Queries begin .. end see some entry of the tile; of them, full .. full_end see all of it.
        begin = count_below(query_positions, T, low)
        full = count_below(query_positions, T, high)
        end = T + begin * 0
        full_end = end
        if MODEL_WINDOW:
            end = tl.maximum(count_below(query_positions, T, high + window), begin)
            full_end = tl.minimum(count_below(query_positions, T, low + window), end)
        if first + BLOCK_N > S:
            full = end
        full = tl.minimum(full, end)
        front = tl.cdiv(full - begin, BLOCK_M)
        middle = tl.maximum(full_end - (begin + front * BLOCK_M), 0) // BLOCK_M
        steps = tl.cdiv(end - begin, BLOCK_M)

        k += kv.to(tl.int64) * k_head
        tile_k = tl.load(
            k + entry.to(tl.int64)[None, :] * k_row + d[:, None],
            mask=live[None, :] & (d < D)[:, None],
            other=0.0,
        )
        if BIAS:
            tile_bias = tl.load(bias + kv.to(tl.int64) * bias_head + entry, mask=live, other=0.0)
        q += head.to(tl.int64) * q_head
        lse += head.to(tl.int64) * lse_head
        for PHASE in tl.static_range(3):
            if PHASE == 0:
                this, until = front * 0, front
            elif PHASE == 1:
                this, until = front, front + middle
            else:
                this, until = front + middle, steps
            for i in tl.range(this, until):
                row = begin + i * BLOCK_M + tl.arange(0, BLOCK_M)
                row_ok = row < end
                row64 = row.to(tl.int64)
                tile_q = tl.load(
                    q + row64[:, None] * q_row + d[None, :],
                    mask=row_ok[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                below = tl.load(lse + row64 * lse_row, mask=row_ok, other=float("-inf"))
                # Rows that saw nothing, and rows behind the end, weigh nothing.
                below = tl.where(below == float("-inf"), float("inf"), below)
                logits = tl.dot(tile_q, tile_k, input_precision="ieee")
                if SOFTCAP:
                    logits = soft_capped(logits * scale, softcap) * LOG2E
                else:
                    logits = logits * (scale * LOG2E)
                if BIAS:
                    logits += tile_bias[None, :] * LOG2E
                weights = tl.exp2(logits - below[:, None] * LOG2E)
                if PHASE != 1:
                    q_pos = tl.load(query_positions + row, mask=row_ok, other=0)
                    seen = row_ok[:, None] & live[None, :] & (position[None, :] <= q_pos[:, None])
                    if MODEL_WINDOW:
                        seen &= q_pos[:, None] - position[None, :] < window
                    weights = tl.where(seen, weights, 0.0)
                total += tl.sum(weights, 0)
    tl.store(out + head.to(tl.int64) * S_out + entry, total, mask=entry < S_out)


def mass(
    q_THD: Tensor, segment: Segment, spec: AttentionSpec, query_positions: Tensor, lse_TH: Tensor
) -> Tensor:
    """As :func:`winnow.kernels.mass.mass`, on the device of the queries."""
    T, heads, D = q_THD.shape
    device, H = q_THD.device, segment.heads
    check_operands("mass", q_THD, segment)
    longest = int(segment.lengths.max())
    mass_HS = torch.empty(heads, longest, device=device)
    if longest == 0:
        return mass_HS
    positions, bias = segment.positions, segment.bias
    some = mass_HS  # stands in for absent operands
    _mass[lambda meta: (triton.cdiv(longest, meta["BLOCK_N"]), heads)](
        q_THD, segment.k, lse_TH, mass_HS, on_device(query_positions, device, torch.int32),
        on_device(segment.lengths, device, torch.int32), ptr(positions, some), ptr(bias, some),
        T, longest, q_THD.stride(0), q_THD.stride(1), segment.k.stride(1), segment.k.stride(0),
        lse_TH.stride(0), lse_TH.stride(1), 0 if positions is None else positions.stride(0),
        0 if bias is None else bias.stride(0),
        segment.start, spec.scale, spec.softcap or 0.0, spec.window or 0,
        D=D, BLOCK_D=max(next_power_of_2(D), 16), G=heads // H, SIZE=min(next_power_of_2(T), 4096),
        MODEL_WINDOW=spec.window is not None, POSITIONS=positions is not None, BIAS=bias is not None,
        SOFTCAP=spec.softcap is not None,
    )  # fmt: skip
    return mass_HS
