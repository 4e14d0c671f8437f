"""Merging in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from winnow.types import Partial

__all__ = ["merge"]


def merge(partials: Sequence[Partial]) -> Partial:
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
