"""Top-k on a GPU: one program per row finds the smallest selected score by radix, 8 bits a pass.

Scores become unsigned integers of the same order. Each pass counts, among the candidates that agree
in the bits found so far, how many have each value of the next 8 bits. A last pass over the row
writes the selected indices, which are ascending because the row is walked in order.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.triton_support import interpreted, next_power_of_2, on_device, tl, triton

__all__ = ["top_k"]


@triton.jit
def _ordered(scores, column, length):
    """Unsigned keys in the order of the scores, and which of them may be selected."""
    score = tl.load(scores + column, mask=column < length, other=float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    # Negative numbers fall as their magnitude grows: flip it. Then move the sign to the front.
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return key, score > float("-inf")  # neither -inf nor NaN


@triton.jit(do_not_specialize=["most"])
def _top_k(scores, lengths, ks, indices, counts, row_stride, most, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * row_stride
    indices += row * most
    length = tl.load(lengths + row)
    lane = tl.arange(0, BLOCK)
    digit = tl.arange(0, 256)

    wanted = tl.load(ks + row)
    take = wanted
    equal = wanted * 0  # candidates whose key is the smallest selected one
    smallest = (wanted * 0).to(tl.uint32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        histogram = tl.zeros([256], tl.int32)
        for begin in tl.range(0, length, BLOCK):
            key, candidate = _ordered(scores, begin + lane, length)
            if step > 0:
                candidate &= (key >> (shift + 8)) == (smallest >> (shift + 8))
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=candidate)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        if step == 0:
            take = tl.minimum(wanted, tl.sum(histogram, 0))
            wanted = take
        # The largest digit that enough candidates reach; `wanted` of those that have it are taken.
        found = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        equal = tl.sum(tl.where(digit == found, histogram, 0), 0)
        wanted -= tl.sum(tl.where(digit == found, at_least, 0), 0) - equal
        smallest |= found.to(tl.uint32) << shift

    written = take * 0
    passed = take * 0  # equal candidates seen so far: the last `wanted` of them are taken
    if take > 0:
        for begin in tl.range(0, length, BLOCK):
            key, candidate = _ordered(scores, begin + lane, length)
            ties = (candidate & (key == smallest)).to(tl.int32)
            order = passed + tl.cumsum(ties, 0) - 1
            chosen = (candidate & (key > smallest)) | ((ties > 0) & (order >= equal - wanted))
            slot = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(indices + slot, begin + lane, mask=chosen)
            written += tl.sum(chosen.to(tl.int32), 0)
            passed += tl.sum(ties, 0)
    for begin in tl.range(take, most, BLOCK):
        tl.store(indices + begin + lane, -1, mask=begin + lane < most)
    tl.store(counts + row, take)


def top_k(scores_RS: Tensor, lengths_R: Tensor, k_R: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """As :func:`winnow.kernels.top_k.top_k`, on the device of the scores."""
    rows, S = scores_RS.shape
    lengths = lengths_R.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= S:
        raise ValueError("top_k: a length lies outside its row")
    device = scores_RS.device
    indices = torch.empty(rows, most, dtype=torch.int32, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    if rows:
        # Few programs run, so each brings many threads and much in flight.
        block = 64 if interpreted() else min(max(next_power_of_2(S), 1024), 8192)
        _top_k[(rows,)](
            scores_RS, on_device(lengths_R, device, torch.int32), on_device(k_R, device, torch.int32),
            indices, counts, scores_RS.stride(0), most, BLOCK=block, num_warps=16 if block > 1024 else 4,
        )  # fmt: skip
    return indices, counts
