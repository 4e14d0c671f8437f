"""Top-k selection in plain PyTorch: the oracle, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["top_k"]


def top_k(scores_RS: Tensor, lengths_R: Tensor, k_R: Tensor, most: int) -> tuple[Tensor, Tensor]:
    indices = torch.full((scores_RS.shape[0], most), -1, dtype=torch.int32, device=scores_RS.device)
    counts = []
    for r, (length, k) in enumerate(zip(lengths_R.tolist(), k_R.tolist(), strict=True)):
        if not 0 <= length <= scores_RS.shape[1]:
            raise ValueError("top_k: a length lies outside its row")
        candidates = (scores_RS[r, :length] > -torch.inf).nonzero().flatten().flip(0)
        # A stable sort of the latest first puts the latest of equal scores first.
        order = scores_RS[r, candidates].sort(descending=True, stable=True).indices
        chosen = candidates[order[:k]].sort().values
        indices[r, : chosen.numel()] = chosen.int()
        counts.append(chosen.numel())
    return indices, torch.tensor(counts, dtype=torch.int32, device=scores_RS.device)
