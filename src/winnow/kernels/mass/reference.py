"""Attention mass in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.types import AttentionSpec, Segment

__all__ = ["mass"]

_TILE = 1 << 22  # scores that are held at a time


def mass(
    q_THD: Tensor, segment: Segment, spec: AttentionSpec, query_positions: Tensor, lse_TH: Tensor
) -> Tensor:
    T, heads, _ = q_THD.shape
    group = heads // segment.heads
    longest = int(segment.lengths.max())
    mass_HS = torch.zeros(heads, longest, device=q_THD.device)
    q_pos_T = query_positions.to(q_THD.device)
    for n in range(heads):
        h = n // group
        S = int(segment.lengths[h])
        if S == 0:
            continue
        k_SD, k_pos_S = segment.k[h, :S].float(), segment.positions_of(h)
        rows = max(1, _TILE // S)
        for first in range(0, T, rows):
            tile = slice(first, min(first + rows, T))
            logits_TS = q_THD[tile, n].float() @ k_SD.T * spec.scale
            if spec.softcap is not None:
                logits_TS = spec.softcap * torch.tanh(logits_TS / spec.softcap)
            if segment.bias is not None:
                logits_TS = logits_TS + segment.bias[h, :S]
            gap_TS = q_pos_T[tile, None] - k_pos_S[None]
            seen_TS = gap_TS >= 0 if spec.window is None else (gap_TS >= 0) & (gap_TS < spec.window)
            # A query that gives nothing anything has no sum to divide by.
            seen_TS &= lse_TH[tile, n, None] > -torch.inf
            p_TS = torch.exp(logits_TS - lse_TH[tile, n, None])
            mass_HS[n, :S] += p_TS.masked_fill(~seen_TS, 0.0).sum(0)
    return mass_HS
