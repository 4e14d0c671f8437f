"""Prefill attention on a GPU: one program per query head and tile of query rows.

A program walks the entries that its rows may see and keeps a running softmax in base 2. Where
positions ascend, the entries that *every* row of the tile sees are one interval, found once per
tile; inside it no mask is computed. Only the tiles at its two ends, where the diagonal or a
window cuts through, pay for the comparison of positions.
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
    ptr,
    soft_capped,
    tl,
    triton,
    tuned,
)
from winnow.types import AttentionSpec, Blocks, Dense, Form, Partial, Segment, Stripes, Window

__all__ = ["count_pairs", "prefill"]

SHARED_BYTES = 227 * 1024  # of one program on sm_90; Triton skips what does not fit elsewhere
FORMS = {Dense: 0, Window: 1, Blocks: 2, Stripes: 3}
# The same numbers where kernels can see them.
WINDOW, BLOCKS, STRIPES = (tl.constexpr(n) for n in (1, 2, 3))


@triton.jit
def first_local(q_pos, local, align):
    """The earliest position of the local part of the window form."""
    return tl.where(align == 1, q_pos - local + 1, q_pos // align * align - (local - align))


def _fits(c: Any, call: Mapping[str, Any]) -> bool:
    """Whether a tile suits a call: no larger than the lists' blocks or the card's shared memory."""
    block_m, block_n, D = c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], call["D"]
    if call["FORM"] == FORMS[Blocks] and (
        block_m > next_power_of_2(call["BLOCK"]) or call["BLOCK"] % block_n != 0
    ):
        return False
    if call["q"].dtype == torch.float32:  # outside the matrix units, on registers
        return bool(block_m * block_n * D <= 32 * 16 * 128)
    if 2 * D * (block_m + 2 * c.num_stages * block_n) > SHARED_BYTES:
        return False
    rows = next_power_of_2(min(call["rows"], call["T"]))
    return bool(block_m <= max(rows, 16) and (block_m >= 64 or rows < 64 or call["FORM"] == FORMS[Blocks]))


@tuned(
    [
        config(8, 2, BLOCK_M=128, BLOCK_N=128),
        config(8, 3, BLOCK_M=128, BLOCK_N=64),
        config(4, 3, BLOCK_M=128, BLOCK_N=64),
        config(4, 3, BLOCK_M=64, BLOCK_N=128),
        config(4, 3, BLOCK_M=64, BLOCK_N=64),
        config(4, 2, BLOCK_M=64, BLOCK_N=32),
        config(4, 2, BLOCK_M=32, BLOCK_N=32),
        config(4, 2, BLOCK_M=32, BLOCK_N=16),
        config(4, 2, BLOCK_M=16, BLOCK_N=16),
    ],
    key=["D", "G", "FORM", "BLOCK", "SIZE", "MODEL_WINDOW", "BIAS", "SOFTCAP", "POSITIONS"],
    small={"BLOCK_M": 32, "BLOCK_N": 32},
    keep=_fits,
)
@triton.jit(do_not_specialize=["T", "start", "window", "init", "local", "align", "rows", "phase"])
def _prefill(
    q, k, v, out, lse, row_max, counts, query_positions, lengths, positions, bias, offsets, columns,
    T, q_row, q_head, k_row, k_head, v_row, v_head, positions_head, bias_head, offsets_head,
    start, scale, softcap, window, init, local, align, rows, phase,
    D: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, MODEL_WINDOW: tl.constexpr, POSITIONS: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, COUNT: tl.constexpr, ROW_MAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, query heads). ``rows`` rows of the call share a list of entries."""
    # The last tiles see most entries: starting with them keeps the end of the launch even.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    per_list = tl.cdiv(rows, BLOCK_M)
    listing = tile // per_list
    first_row = tl.maximum(listing * rows - phase, 0) + tile % per_list * BLOCK_M
    end_row = tl.minimum((listing + 1) * rows - phase, T)
    if first_row >= end_row:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    row_ok = row < end_row
    d = tl.arange(0, BLOCK_D)
    row64 = row.to(tl.int64)
    tile_q = tl.load(
        q + head.to(tl.int64) * q_head + row64[:, None] * q_row + d[None, :],
        mask=row_ok[:, None] & (d < D)[None, :],
        other=0.0,
    )
    # Rows behind the end repeat the last one, so that they never widen what the tile reads.
    q_pos = tl.load(query_positions + tl.minimum(row, end_row - 1))
    q_low = tl.load(query_positions + first_row)
    q_high = tl.load(query_positions + tl.minimum(first_row + BLOCK_M, end_row) - 1)

    kv = head // G
    S = tl.load(lengths + kv)
    k += kv.to(tl.int64) * k_head
    v += kv.to(tl.int64) * v_head
    positions += kv.to(tl.int64) * positions_head
    bias += kv.to(tl.int64) * bias_head

    lane = tl.arange(0, BLOCK_N)
    high = entries_before(q_high + 1, S, start, positions, POSITIONS)  # seen by the last row
    full_high = entries_before(q_low + 1, S, start, positions, POSITIONS)  # seen by every row

    # Steps 0 .. front read a tile that a window's edge cuts, front .. full one that every row sees,
    # full .. steps one that the diagonal cuts.
    front = high * 0
    if FORM >= BLOCKS:  # blocks or stripes
        begin = tl.load(offsets + head.to(tl.int64) * offsets_head + listing)
        listed = tl.load(offsets + head.to(tl.int64) * offsets_head + listing + 1) - begin
        columns += begin
    if FORM == BLOCKS:
        PER: tl.constexpr = (BLOCK + BLOCK_N - 1) // BLOCK_N
        steps = listed * PER
        full = front
        if not MODEL_WINDOW and BLOCK % BLOCK_N == 0:
            full = count_below(columns, listed, full_high // BLOCK) * PER
    elif FORM == STRIPES:
        listed = count_below(columns, listed, high)
        steps = tl.cdiv(listed, BLOCK_N)
        full = front
        if not MODEL_WINDOW:
            full = count_below(columns, listed, full_high) // BLOCK_N
    else:
        low = high * 0
        full_low = low
        if MODEL_WINDOW:
            low = tl.minimum(entries_before(q_low - window + 1, S, start, positions, POSITIONS), high)
            full_low = entries_before(q_high - window + 1, S, start, positions, POSITIONS)
        init_low = low
        if FORM == WINDOW:
            init_end = tl.minimum(entries_before(init, S, start, positions, POSITIONS), high)
            front = tl.cdiv(tl.maximum(init_end - init_low, 0), BLOCK_N)
            first = entries_before(first_local(q_low, local, align), S, start, positions, POSITIONS)
            full_first = entries_before(first_local(q_high, local, align), S, start, positions, POSITIONS)
            low = tl.minimum(tl.maximum(tl.maximum(low, init_end), first), high)
            full_low = tl.maximum(full_low, full_first)
        init_steps = front
        if MODEL_WINDOW or FORM == WINDOW:
            front += tl.minimum(tl.cdiv(tl.maximum(full_low - low, 0), BLOCK_N), tl.cdiv(high - low, BLOCK_N))
        full = tl.maximum(front, init_steps + tl.maximum(full_high - low, 0) // BLOCK_N)
        steps = init_steps + tl.cdiv(high - low, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32) + (full - front) * BLOCK_N
    for PHASE in tl.static_range(3):
        if PHASE == 0:
            this, end = front * 0, front
        elif PHASE == 1:
            this, end = front, full
        else:
            this, end = full, steps
        for i in tl.range(this, end):
            if FORM == STRIPES:
                live = i * BLOCK_N + lane < listed
                entry = tl.load(columns + i * BLOCK_N + lane, mask=live, other=0)
            elif FORM == BLOCKS:
                column = tl.load(columns + i // PER) * BLOCK
                entry = column + i % PER * BLOCK_N + lane
                live = entry < tl.minimum(column + BLOCK, high)
            elif PHASE == 0 and FORM == WINDOW:
                in_init = i < init_steps
                entry = tl.where(in_init, init_low, low - init_steps * BLOCK_N) + i * BLOCK_N + lane
                live = entry < tl.where(in_init, init_end, high)
            else:
                entry = low + (i - init_steps) * BLOCK_N + lane
                live = entry < high
            k_at = k + entry.to(tl.int64)[None, :] * k_row + d[:, None]
            v_at = v + entry.to(tl.int64)[:, None] * v_row + d[None, :]
            if PHASE != 1:
                # Memory behind a head's length may hold anything, NaN included, and 0 * NaN is NaN.
                tile_k = tl.load(k_at, mask=live[None, :] & (d < D)[:, None], other=0.0)
                tile_v = tl.load(v_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
            elif D == BLOCK_D:
                tile_k = tl.load(k_at)
                tile_v = tl.load(v_at)
            else:
                tile_k = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
                tile_v = tl.load(v_at, mask=(d < D)[None, :], other=0.0)
            logits = tl.dot(tile_q, tile_k, input_precision="ieee")
            if SOFTCAP:
                logits = soft_capped(logits * scale, softcap) * LOG2E
            else:
                logits = logits * (scale * LOG2E)
            if BIAS:
                logits += tl.load(bias + entry, mask=live, other=0.0)[None, :] * LOG2E
            if PHASE != 1:
                if POSITIONS:
                    position = tl.load(positions + entry, mask=live, other=0)
                else:
                    position = start + entry
                seen = live[None, :] & (position[None, :] <= q_pos[:, None])
                if MODEL_WINDOW:
                    seen &= q_pos[:, None] - position[None, :] < window
                if FORM == WINDOW:
                    first_pos = first_local(q_pos, local, align)
                    seen &= (position < init)[None, :] | (position[None, :] >= first_pos[:, None])
                logits = tl.where(seen, logits, float("-inf"))
                if COUNT:
                    count += tl.sum(seen.to(tl.int32), 1)
            highest = tl.maximum(top, tl.max(logits, 1))
            shift = highest
            if PHASE != 1 or BIAS:
                # A row that has seen nothing yet has highest = -inf, and -inf - -inf is NaN.
                shift = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(logits - shift[:, None])
            fade = tl.exp2(top - shift)
            total = total * fade + tl.sum(weights, 1)
            acc = tl.dot(weights.to(tile_v.dtype), tile_v, acc * fade[:, None], input_precision="ieee")
            top = highest

    blind = total == 0.0  # rows that see nothing: zero, and -inf for the log-sum-exp
    total = tl.where(blind, 1.0, total)
    acc = acc / total[:, None]
    heads = tl.num_programs(1)
    cell = row64 * heads + head
    tl.store(
        out + cell[:, None] * D + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=row_ok[:, None] & (d < D)[None, :],
    )
    tl.store(lse + cell, tl.where(blind, float("-inf"), (top + tl.log2(total)) * LN2), mask=row_ok)
    if ROW_MAX:
        tl.store(row_max + cell, top * LN2, mask=row_ok)
    if COUNT:
        tl.store(counts + cell, count, mask=row_ok)


def count_pairs(
    query_positions: Tensor, lengths: Tensor, start: int, spec: AttentionSpec, form: Dense | Window
) -> int:
    """Visible pairs of one query head per KV head, where positions are consecutive.

    Parameters
    ----------
    query_positions : Tensor
        ``[T]`` on the CPU.
    lengths : Tensor
        ``[H]`` on the CPU.
    start : int
        Position of entry 0.
    spec : AttentionSpec
        Only its window matters.
    form : Dense or Window
        The forms that need no list.

    Returns
    -------
    int
    """
    q_T = query_positions.long() - start
    total = 0
    for S in lengths.tolist():
        high_T = (q_T + 1).clamp(0, S)
        low_T = torch.zeros_like(q_T) if spec.window is None else (q_T - spec.window + 1).clamp(0, S)
        if isinstance(form, Dense):
            total += int((high_T - low_T).clamp_min(0).sum())
            continue
        if form.align == 1:
            first_T = q_T - form.local + 1
        else:
            first_T = (q_T + start) // form.align * form.align - (form.local - form.align) - start
        init_T = high_T.clamp_max(max(form.init - start, 0))
        local_T = torch.maximum(torch.maximum(low_T, init_T), first_T)
        total += int((init_T - low_T).clamp_min(0).sum() + (high_T - local_T).clamp_min(0).sum())
    return total


def prefill(
    q_THD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    query_positions: Tensor,
    form: Form,
    want_row_max: bool,
) -> Partial:
    """As :func:`winnow.kernels.prefill.prefill`, on the device of the queries.

    ``pairs`` costs nothing for dense and window forms over consecutive positions. Elsewhere the
    kernel counts, and reading its count waits for the device.
    """
    T, heads, D = q_THD.shape
    device, H = q_THD.device, segment.heads
    check_operands("prefill", q_THD, segment)
    out_THD = torch.empty(T, heads, D, dtype=q_THD.dtype, device=device)
    lse_TH = torch.empty(T, heads, dtype=torch.float32, device=device)
    max_TH = torch.empty_like(lse_TH) if want_row_max else None
    if T == 0:
        return Partial(out=out_THD, lse=lse_TH, pairs=0, row_max=max_TH)

    on_host = segment.positions is None and isinstance(form, Dense | Window)
    counts_TH = None if on_host else torch.empty(T, heads, dtype=torch.int32, device=device)
    rows, phase, block, lists = T, 0, 0, 1
    offsets = columns = None
    if isinstance(form, Blocks | Stripes):
        offsets = on_device(form.offsets, device, torch.int32)
        columns = on_device(form.columns, device, torch.int32)
        lists = offsets.shape[1] - 1
        if isinstance(form, Blocks):
            rows = block = form.block
        else:
            rows, phase = form.rows, form.phase
    init, local, align = (form.init, form.local, form.align) if isinstance(form, Window) else (0, 0, 1)
    positions, bias = segment.positions, segment.bias
    some = lse_TH  # stands in for absent operands
    _prefill[lambda meta: (lists * triton.cdiv(rows, meta["BLOCK_M"]), heads)](
        q_THD, segment.k, segment.v, out_THD, lse_TH, ptr(max_TH, some), ptr(counts_TH, some),
        on_device(query_positions, device, torch.int32), on_device(segment.lengths, device, torch.int32),
        ptr(positions, some), ptr(bias, some), ptr(offsets, some), ptr(columns, some),
        T, q_THD.stride(0), q_THD.stride(1), segment.k.stride(1), segment.k.stride(0),
        segment.v.stride(1), segment.v.stride(0), 0 if positions is None else positions.stride(0),
        0 if bias is None else bias.stride(0), 0 if offsets is None else offsets.stride(0),
        segment.start, spec.scale, spec.softcap or 0.0, spec.window or 0, init, local, align, rows, phase,
        D=D, BLOCK_D=max(next_power_of_2(D), 16), G=heads // H, FORM=FORMS[type(form)], BLOCK=block,
        SIZE=min(next_power_of_2(T), 4096), MODEL_WINDOW=spec.window is not None,
        POSITIONS=positions is not None, BIAS=bias is not None, SOFTCAP=spec.softcap is not None,
        COUNT=counts_TH is not None, ROW_MAX=want_row_max,
    )  # fmt: skip
    if isinstance(form, Dense | Window) and counts_TH is None:
        group = heads // H
        pairs = group * count_pairs(query_positions, segment.lengths, segment.start, spec, form)
    else:
        assert counts_TH is not None
        pairs = int(counts_TH.sum(dtype=torch.int64))
    return Partial(out=out_THD, lse=lse_TH, pairs=pairs, row_max=max_TH)
