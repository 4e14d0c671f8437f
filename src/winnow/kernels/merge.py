"""Exact merging of attention over disjoint sets of entries, by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.types import Partial

__all__ = ["add_sinks", "merge"]


def merge(partials: Sequence[Partial]) -> Partial:
    """Merge partial results over disjoint entries into one.

    Parameters
    ----------
    partials : sequence of Partial
        At least one, all of the same ``[T, H * G, D]``.

    Returns
    -------
    Partial
        ``out = sum_p exp(lse_p - lse) out_p`` in float32 (a single partial is returned as it
        is). ``row_max`` and ``logits`` do not survive a merge of several.
    """
    if len(partials) == 1:
        return partials[0]
    lse_pTH = torch.stack([p.lse for p in partials])
    top_TH = lse_pTH.amax(0)
    # A row that saw nothing anywhere has top = -inf: shift by 0 there so that no NaN appears.
    shift_TH = torch.where(torch.isneginf(top_TH), 0.0, top_TH)
    weight_pTH = torch.exp(lse_pTH - shift_TH)
    total_TH = weight_pTH.sum(0)
    out_THD = sum(
        (w_TH.unsqueeze(-1) * p.out.float() for w_TH, p in zip(weight_pTH, partials, strict=True)),
        start=torch.zeros_like(partials[0].out, dtype=torch.float32),
    )
    out_THD = out_THD / total_TH.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return Partial(out=out_THD, lse=torch.log(total_TH) + shift_TH, pairs=sum(p.pairs for p in partials))


def add_sinks(partial: Partial, sinks_H: Tensor) -> Partial:
    """Add one virtual entry of value zero and logit ``sinks_H`` ``[H * G]`` to every row."""
    sinks_H = sinks_H.float()
    lse_TH = torch.logaddexp(partial.lse, sinks_H)
    out_THD = partial.out.float() * torch.exp(partial.lse - lse_TH).unsqueeze(-1)
    return Partial(out=out_THD, lse=lse_TH, pairs=partial.pairs)
