"""Decode attention over keys that are a product in plain PyTorch: rebuild, then attend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from winnow.kernels.decode import reference as dense
from winnow.types import AttentionSpec, Factors, Partial, Segment, Selection

__all__ = ["rebuilt_decode"]


def rebuilt_decode(
    q_HD: Tensor,
    stored: Segment,
    factors: Factors,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    want_logits: bool,
) -> Partial:
    k = torch.zeros_like(stored.v[:, : int(stored.lengths.max()) if stored.heads else 0])
    for head, n in enumerate(stored.lengths.tolist()):
        at = stored.positions_of(head).long()
        k_nD = factors.left[at - factors.start].float() @ factors.right[head].float()
        k[head, :n] = k_nD if factors.rotary is None else factors.rotary.turn(k_nD, at)
    return dense.decode(q_HD, replace(stored, k=k), spec, position, selection, want_logits)
