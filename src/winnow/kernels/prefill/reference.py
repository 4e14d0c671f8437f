"""Prefill attention in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.types import AttentionSpec, Blocks, Dense, Form, Partial, Segment, Window

__all__ = ["form_mask", "prefill", "visible_mask"]


def form_mask(form: Form, query_head: int, q_pos_T: Tensor, k_pos_S: Tensor) -> Tensor:
    """``[T, S]`` bool: which pairs ``form`` lists for one query head, causality aside."""
    T, S = q_pos_T.numel(), k_pos_S.numel()
    device = k_pos_S.device
    if isinstance(form, Dense):
        return torch.ones(T, S, dtype=torch.bool, device=device)
    if isinstance(form, Window):
        if form.align == 1:
            first_T = q_pos_T - form.local + 1
        else:
            first_T = q_pos_T // form.align * form.align - (form.local - form.align)
        return (k_pos_S[None] < form.init) | (k_pos_S[None] >= first_T[:, None])
    if isinstance(form, Blocks):
        row_T, size, limit = torch.arange(T) // form.block, form.block, -(-S // form.block)
    else:
        row_T, size, limit = (torch.arange(T) + form.phase) // form.rows, 1, S
    listed = torch.zeros(int(row_T[-1]) + 1 if T else 0, limit, dtype=torch.bool)
    for r in range(listed.shape[0]):
        a, b = (int(x) for x in form.offsets[query_head, r : r + 2])
        listed[r, form.columns[a:b].long().cpu()] = True
    return listed.repeat_interleave(size, 1)[:, :S][row_T].to(device)


def visible_mask(form: Form, query_head: int, q_pos_T: Tensor, k_pos_S: Tensor, window: int | None) -> Tensor:
    """``[T, S]`` bool: form, causality and the model's sliding window together."""
    gap_TS = q_pos_T[:, None] - k_pos_S[None]
    seen_TS = (gap_TS >= 0) & form_mask(form, query_head, q_pos_T, k_pos_S)
    return seen_TS if window is None else seen_TS & (gap_TS < window)


def prefill(
    q_THD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    query_positions: Tensor,
    form: Form,
    want_row_max: bool,
) -> Partial:
    T, heads, D = q_THD.shape
    group = heads // segment.heads
    out_THD = torch.zeros(T, heads, D, dtype=q_THD.dtype, device=q_THD.device)
    lse_TH = torch.full((T, heads), -torch.inf, device=q_THD.device)
    max_TH = torch.full((T, heads), -torch.inf, device=q_THD.device)
    q_pos_T = query_positions.to(q_THD.device)
    pairs = 0
    for n in range(heads):
        h = n // group
        S = int(segment.lengths[h])
        if S == 0 or T == 0:
            continue
        k_SD, v_SD = segment.k[h, :S].float(), segment.v[h, :S].float()
        logits_TS = q_THD[:, n].float() @ k_SD.T * spec.scale
        if spec.softcap is not None:
            logits_TS = spec.softcap * torch.tanh(logits_TS / spec.softcap)
        if segment.bias is not None:
            logits_TS = logits_TS + segment.bias[h, :S]
        seen_TS = visible_mask(form, n, q_pos_T, segment.positions_of(h), spec.window)
        logits_TS = logits_TS.masked_fill(~seen_TS, -torch.inf)
        max_TH[:, n] = logits_TS.amax(-1)
        lse_TH[:, n] = torch.logsumexp(logits_TS, -1)
        # Rows that see nothing: softmax would be NaN, the partial's convention is zero.
        probs_TS = torch.softmax(logits_TS, -1).nan_to_num(0.0)
        out_THD[:, n] = (probs_TS @ v_SD).to(q_THD.dtype)
        pairs += int(seen_TS.sum())
    return Partial(out=out_THD, lse=lse_TH, pairs=pairs, row_max=max_TH if want_row_max else None)
