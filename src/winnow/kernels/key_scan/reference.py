"""Key scan in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .codes import BLOCK, KeyCodes

__all__ = ["Reduction", "decoded", "key_scan", "quantize_keys", "quantize_rows"]

Reduction = Literal["max", "sum", "none"]


def quantize_rows(x_XD: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Integer codes in ``-limit .. limit`` (as float32) and float32 scales of the last dimension."""
    x_XD = x_XD.float()
    top_X = x_XD.abs().amax(-1)
    most_X = torch.full_like(top_X, limit)
    # A tensor divided by a tensor: with a number on the left PyTorch multiplies by a rounded reciprocal.
    by_X = torch.where(top_X > 0, most_X / top_X, 0.0)
    return (x_XD * by_X[..., None]).clamp(-limit, limit).round(), top_X / most_X


def quantize_keys(k_HCD: Tensor, begin_H: Tensor, end_H: Tensor, into: KeyCodes) -> None:
    limit, offset = (127, 128) if into.bits == 8 else (7, 8)
    for h, (begin, end) in enumerate(zip(begin_H.tolist(), end_H.tolist(), strict=True)):
        if begin < 0 or end > min(into.capacity, k_HCD.shape[1]):
            raise ValueError("quantize_keys: the entries lie outside the reserve; grow it first")
        if begin >= end:
            continue
        code_nD, scale_n = quantize_rows(k_HCD[h, begin:end], limit)
        code_nD = (code_nD + offset).to(torch.uint8)
        if into.bits == 8:
            words = code_nD.view(end - begin, -1, 4)
        else:
            low, high = code_nD.view(end - begin, -1, 2, 4).unbind(2)
            words = low | high << 4  # [n, R, 4]
        entry = torch.arange(begin, end, device=k_HCD.device)
        blocks = into.codes[h].view(*into.codes.shape[1:3], BLOCK, 4)  # [C / 16, R, 16, 4]
        blocks[entry // BLOCK, :, entry % BLOCK] = words
        into.scales[h, begin:end] = scale_n


def decoded(keys: KeyCodes) -> Tensor:
    """``[H, C, D]`` float32 integer codes, without their offset and scale."""
    words = keys.codes.view(*keys.codes.shape[:3], BLOCK, 4).transpose(2, 3)  # [H, C / 16, 16, R, 4]
    if keys.bits == 4:
        words = torch.stack((words & 15, words >> 4), dim=4)
    return words.flatten(3).flatten(1, 2).float() - (128 if keys.bits == 8 else 8)


def key_scan(q_HD: Tensor, keys: KeyCodes, lengths_H: Tensor, reduce: Reduction, width: int) -> Tensor:
    heads = keys.codes.shape[0]
    q_code, q_scale = quantize_rows(q_HD, 127)
    # At most 256 * 127 * 127: integers below 2^24, so float32 products and sums are exact.
    dots = q_code.view(heads, -1, keys.dim) @ decoded(keys).transpose(1, 2)  # [H, G, C]
    scores = dots * q_scale.view(heads, -1, 1) * keys.scales[:, None]
    lengths_H = lengths_H.to(scores.device)
    if int(lengths_H.min()) < 0 or int(lengths_H.max()) > min(keys.capacity, width):
        raise ValueError("key_scan: a length lies outside the reserve")
    out = scores.new_full((heads, scores.shape[1], width), -torch.inf)
    shown = min(keys.capacity, width)
    out[..., :shown] = scores[..., :shown]
    behind = torch.arange(width, device=scores.device) >= lengths_H[:, None, None]
    if reduce == "none":
        return out.masked_fill(behind, -torch.inf).flatten(0, 1)
    reduced = out.amax(1) if reduce == "max" else out.sum(1)
    return reduced.masked_fill(behind[:, 0], -torch.inf)
