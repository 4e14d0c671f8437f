"""Decode attention on a GPU: the entries of a head are split over programs, then merged.

One query per head leaves a GPU idle unless a head's entries are shared out. A program takes one
KV head's ``G`` queries as the rows of a matrix product, so every entry is read once, walks its
share of the entries and leaves a partial result with its log-sum-exp; a second kernel merges them.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.triton_support import (
    LN2,
    LOG2E,
    check_operands,
    config,
    count_below,
    entries_before,
    next_power_of_2,
    on_device,
    processors,
    ptr,
    soft_capped,
    tl,
    triton,
    tuned,
)
from winnow.types import AttentionSpec, Partial, Segment, Selection

__all__ = ["decode"]

MOST_SPLITS = 128
MERGE_D = 64  # columns of the output that one merging program takes


def _fits(c: Any, call: Mapping[str, Any]) -> bool:
    """Float32 products run outside the matrix units, on registers: small tiles only."""
    return bool(call["q"].dtype != torch.float32 or c.kwargs["BLOCK_N"] <= 16)


@tuned(
    [
        config(4, 3, BLOCK_N=64),
        config(4, 4, BLOCK_N=64),
        config(4, 2, BLOCK_N=128),
        config(4, 3, BLOCK_N=128),
        config(8, 3, BLOCK_N=128),
        config(2, 4, BLOCK_N=32),
        config(4, 3, BLOCK_N=16),
    ],
    key=["D", "GROUP", "LISTED", "PAGE", "LONG", "POSITIONS", "BIAS", "SOFTCAP"],
    small={"BLOCK_N": 16},
    keep=_fits,
)
@triton.jit(do_not_specialize=["logits_head", "start", "position", "window"])
def _split(
    q, k, v, k_mask, v_mask, parts, parts_lse, logits_out, seen_out,
    lengths, positions, bias, indices, listed,
    q_head, k_row, k_head, v_row, v_head, k_mask_head, v_mask_head,
    positions_head, bias_head, indices_row, logits_head, start, position, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    ROWS_PER_KV: tl.constexpr, LISTED: tl.constexpr, PAGE: tl.constexpr, LONG: tl.constexpr,
    MODEL_WINDOW: tl.constexpr, POSITIONS: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, splits). A row is a KV head, or a query head where each has its own list."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    kv = (row // ROWS_PER_KV).to(tl.int64)
    k += kv * k_head
    v += kv * v_head
    positions += kv * positions_head
    bias += kv * bias_head
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_N)
    head = row * GROUP + g
    tile_q = tl.load(
        q + head[:, None] * q_head + d[None, :], mask=(g < GROUP)[:, None] & (d < D)[None, :], other=0.0
    )

    # Positions ascend, so what the query sees is one interval of entries.
    S = tl.load(lengths + kv)
    high = S
    if POSITIONS:
        # Nearly always the query is newer than every entry: one load answers that.
        newest = tl.load(positions + S - 1, mask=S > 0, other=position)
        searched = tl.where(newest > position, S, 0)
        high = tl.where(newest > position, count_below(positions, searched, position + 1), S)
    else:
        high = entries_before(position + 1, S, start, positions, POSITIONS)
    low = high * 0
    if MODEL_WINDOW:
        low = tl.minimum(entries_before(position - window + 1, S, start, positions, POSITIONS), high)
    if LISTED:
        items = tl.load(listed + row) * PAGE
        indices += row.to(tl.int64) * indices_row
    else:
        items = high - low
    share = tl.cdiv(tl.cdiv(items, splits), BLOCK_N) * BLOCK_N
    begin = tl.minimum(split * share, items)
    end = tl.minimum(begin + share, items)

    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    seen = tl.zeros([BLOCK_N], tl.int32)
    for i in tl.range(begin, end, BLOCK_N):
        live = i + lane < end
        if LISTED:
            item = i + lane
            entry = tl.load(indices + item // PAGE, mask=live, other=0) * PAGE + item % PAGE
            live &= (entry >= low) & (entry < high)
        else:
            entry = low + i + lane
        if COUNT:
            seen += live.to(tl.int32)
        far = entry.to(tl.int64)
        column_k, there_k = d[:, None], live[None, :] & (d < D)[:, None]
        column_v, there_v = d[None, :], live[:, None] & (d < D)[None, :]
        if MASKED:
            # A set bit's value stands behind as many others as there are bits before it.
            bytes_k = tl.load(
                k_mask + kv * k_mask_head + far[None, :] * (D // 8) + column_k // 8, mask=there_k, other=0
            )
            bytes_v = tl.load(
                v_mask + kv * v_mask_head + far[:, None] * (D // 8) + column_v // 8, mask=there_v, other=0
            )
            bits_k = (bytes_k.to(tl.int32) >> (column_k % 8)) & 1
            bits_v = (bytes_v.to(tl.int32) >> (column_v % 8)) & 1
            column_k, there_k = tl.cumsum(bits_k, 0) - 1, there_k & (bits_k != 0)
            column_v, there_v = tl.cumsum(bits_v, 1) - 1, there_v & (bits_v != 0)
        tile_k = tl.load(k + far[None, :] * k_row + column_k, mask=there_k, other=0.0)
        tile_v = tl.load(v + far[:, None] * v_row + column_v, mask=there_v, other=0.0)
        logits = tl.dot(tile_q, tile_k, input_precision="ieee") * scale
        if SOFTCAP:
            logits = soft_capped(logits, softcap)
        if BIAS:
            logits += tl.load(bias + entry, mask=live, other=0.0)[None, :]
        if LOGITS:
            tl.store(
                logits_out + head.to(tl.int64)[:, None] * logits_head + entry[None, :],
                logits,
                mask=(g < GROUP)[:, None] & live[None, :],
            )
        logits = tl.where(live[None, :], logits * LOG2E, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        # A tile of invisible entries leaves highest = -inf, and -inf - -inf is NaN.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(tile_v.dtype), tile_v, acc * fade[:, None], input_precision="ieee")
        top = highest

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    cell = head.to(tl.int64) * splits + split
    tl.store(
        parts + cell[:, None] * D + d[None, :],
        acc / total[:, None],
        mask=(g < GROUP)[:, None] & (d < D)[None, :],
    )
    tl.store(parts_lse + cell, tl.where(blind, float("-inf"), top + tl.log2(total)), mask=g < GROUP)
    if COUNT:
        tl.store(seen_out + row * splits + split, tl.sum(seen, 0) * GROUP)


@triton.jit(do_not_specialize=["splits"])
def _merge(parts, parts_lse, out, lse, splits, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid: (query heads, slices of D). ``parts_lse`` is in base 2."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, SPLITS)
    part_lse = tl.load(parts_lse + head * splits + s, mask=s < splits, other=float("-inf"))
    top = tl.max(part_lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(part_lse - shift)
    total = tl.sum(weights, 0)
    part = tl.load(
        parts + (head * splits + s)[:, None] * D + d[None, :],
        mask=(s < splits)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    merged = tl.sum(part * weights[:, None], 0) / total
    tl.store(out + head * D + d, merged.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + head, tl.where(blind, float("-inf"), (shift + tl.log2(total)) * LN2))


def _pairs_on_host(
    segment: Segment, spec: AttentionSpec, position: int, selection: Selection | None, group: int
) -> int | None:
    """The visible pairs, or None where only the device can tell."""
    if segment.positions is not None:
        return None
    high_H = (position + 1 - segment.start + 0 * segment.lengths).clamp_min(0).minimum(segment.lengths)
    low_H = torch.zeros_like(high_H)
    if spec.window is not None:
        low_H = (position - spec.window + 1 - segment.start + low_H).clamp_min(0).minimum(high_H)
    if selection is None:
        return int((high_H - low_H).sum()) * group
    all_seen = bool((low_H == 0).all()) and torch.equal(high_H, segment.lengths)
    if selection.page == 1 and selection.counts.device.type == "cpu" and all_seen:
        return int(selection.counts.sum()) * (group if len(selection.counts) == segment.heads else 1)
    return None


def decode(
    q_HD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    want_logits: bool,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Partial:
    """As :func:`winnow.kernels.decode.decode`, on the device of the queries.

    With ``masks`` the rows are packed, as :func:`winnow.kernels.bitmap_decode.bitmap_decode` says.

    ``pairs`` costs nothing where positions are consecutive and everything, or a list of entries
    with counts on the CPU, is read. Elsewhere the kernel counts, and reading its count waits for
    the device.
    """
    heads, D = q_HD.shape
    device, H = q_HD.device, segment.heads
    check_operands("decode", q_HD, segment)
    group = heads // H
    longest = int(segment.lengths.max())
    rows = H if selection is None else selection.indices.shape[0]
    most = longest if selection is None else min(selection.indices.shape[1] * selection.page, longest)
    splits = max(1, min(4 * processors(device) // rows, triton.cdiv(most, 64), MOST_SPLITS))

    pairs = _pairs_on_host(segment, spec, position, selection, group)
    out_HD = torch.empty(heads, D, dtype=q_HD.dtype, device=device)
    lse_H = torch.empty(heads, dtype=torch.float32, device=device)
    parts = torch.empty(heads, splits, D, dtype=torch.float32, device=device)
    parts_lse = torch.empty(heads, splits, dtype=torch.float32, device=device)
    seen = None if pairs is not None else torch.empty(rows, splits, dtype=torch.int32, device=device)
    logits = torch.full((heads, longest), -torch.inf, device=device) if want_logits else None
    indices = listed = None
    if selection is not None:
        indices = on_device(selection.indices, device, torch.int32)
        listed = on_device(selection.counts, device, torch.int32)
    positions, bias = segment.positions, segment.bias
    some = parts_lse  # stands in for absent operands
    k_mask, v_mask = (None, None) if masks is None else masks
    queries_per_row = heads // rows
    _split[(rows, splits)](
        q_HD, segment.k, segment.v, ptr(k_mask, some), ptr(v_mask, some),
        parts, parts_lse, ptr(logits, some), ptr(seen, some),
        on_device(segment.lengths, device, torch.int32), ptr(positions, some), ptr(bias, some),
        ptr(indices, some), ptr(listed, some),
        q_HD.stride(0), segment.k.stride(1), segment.k.stride(0), segment.v.stride(1), segment.v.stride(0),
        0 if k_mask is None else k_mask.stride(0), 0 if v_mask is None else v_mask.stride(0),
        0 if positions is None else positions.stride(0), 0 if bias is None else bias.stride(0),
        0 if indices is None else indices.stride(0), longest,
        segment.start, position, spec.scale, spec.softcap or 0.0, spec.window or 0,
        D=D, BLOCK_D=max(next_power_of_2(D), 16), GROUP=queries_per_row,
        BLOCK_G=max(next_power_of_2(queries_per_row), 16), ROWS_PER_KV=rows // H,
        LISTED=selection is not None, PAGE=1 if selection is None else selection.page, LONG=most > 16384,
        MODEL_WINDOW=spec.window is not None, POSITIONS=positions is not None, BIAS=bias is not None,
        SOFTCAP=spec.softcap is not None, LOGITS=want_logits, COUNT=seen is not None,
        MASKED=masks is not None,
    )  # fmt: skip
    _merge[(heads, triton.cdiv(D, MERGE_D))](
        parts, parts_lse, out_HD, lse_H, splits, D=D, SPLITS=next_power_of_2(splits), BLOCK_D=MERGE_D
    )
    if pairs is None:
        assert seen is not None
        pairs = int(seen.sum(dtype=torch.int64))
    return Partial(out=out_HD[None], lse=lse_H[None], pairs=pairs, logits=logits)
