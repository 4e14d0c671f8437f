"""Decode attention in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.types import AttentionSpec, Partial, Segment, Selection

__all__ = ["decode", "group_mass", "selected"]


def selected(selection: Selection, row: int, length: int) -> Tensor:
    """Entry numbers, ascending int64, that one row of a selection lists."""
    listed = selection.indices[row, : int(selection.counts[row])].long()
    if selection.page == 1:
        return listed.sort().values
    within = torch.arange(selection.page, device=listed.device)
    entries = (listed.sort().values[:, None] * selection.page + within).flatten()
    return entries[entries < length]


def decode(
    q_HD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    want_logits: bool,
) -> Partial:
    heads, D = q_HD.shape
    group = heads // segment.heads
    longest = int(segment.lengths.max()) if segment.heads else 0
    out_HD = torch.zeros(heads, D, dtype=q_HD.dtype, device=q_HD.device)
    lse_H = torch.full((heads,), -torch.inf, device=q_HD.device)
    all_logits = torch.full((heads, longest), -torch.inf, device=q_HD.device)
    pairs = 0
    for n in range(heads):
        h = n // group
        S = int(segment.lengths[h])
        k_pos_S = segment.positions_of(h)
        seen_S = k_pos_S <= position
        if spec.window is not None:
            seen_S &= position - k_pos_S < spec.window
        if selection is not None:
            row = n if selection.indices.shape[0] == heads else h
            listed_S = torch.zeros(S, dtype=torch.bool, device=q_HD.device)
            listed_S[selected(selection, row, S)] = True
            seen_S &= listed_S
        index = seen_S.nonzero().flatten()
        if index.numel() == 0:
            continue
        logits = segment.k[h, index].float() @ q_HD[n].float() * spec.scale
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        if segment.bias is not None:
            logits = logits + segment.bias[h, index]
        all_logits[n, index] = logits
        lse_H[n] = torch.logsumexp(logits, 0)
        out_HD[n] = (torch.softmax(logits, 0) @ segment.v[h, index].float()).to(q_HD.dtype)
        pairs += index.numel()
    return Partial(out=out_HD[None], lse=lse_H[None], pairs=pairs, logits=all_logits if want_logits else None)


def group_mass(logits_NS: Tensor, lse_N: Tensor, heads: int) -> Tensor:
    """Attention probability that the query heads of each KV head together give every entry.

    Parameters
    ----------
    logits_NS : Tensor
        ``[H * G, S]`` float32, ``-inf`` where not read. It becomes the probabilities, in place: it is
        megabytes, and nobody reads it afterwards.
    lse_N : Tensor
        ``[H * G]`` float32 log-sum-exp over all entries; ``-inf`` for a query that saw none.
    heads : int
        ``H``.

    Returns
    -------
    Tensor
        ``[H, S]`` float32.
    """
    # -inf less -inf is no number.
    shift_N = lse_N.masked_fill(lse_N == -torch.inf, 0.0)
    p_NS = logits_NS.sub_(shift_N[:, None]).exp_()
    return p_NS.view(heads, p_NS.shape[0] // heads, p_NS.shape[1]).sum(1)
