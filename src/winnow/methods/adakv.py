"""AdaKV."""

from __future__ import annotations

from typing import Literal

from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.adaptive import Adaptive
from winnow.compression.protocol import Compress
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.recipe import Recipe

__all__ = ["adakv"]


def adakv(
    *,
    keep: int = 1024,
    window: int = 32,
    kernel: int = 7,
    pooling: Literal["avg", "max"] = "max",
    floor: int | None = None,
) -> Recipe:
    """AdaKV (Ada-SnapKV): heads that spread their attention keep more entries than sharp ones.

    Paper: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
    Inference (arXiv 2407.11550). Code: FFY0/AdaKV, ``adaptive_snapkv/monkeypatch/snapkv_utils.py``.

    SnapKV's scores; the budget of a layer is shared by its KV heads. Acts once, at the end of the
    first prefill. The store is ragged, so a head holds exactly what it was given.

    Parameters
    ----------
    keep : int
        Entries per KV head on average, the window included (``base_capacity``).
    window : int
        Last prompt tokens whose queries vote and which stay themselves.
    kernel : int
        Neighbours over which votes are pooled, odd.
    pooling : {"avg", "max"}
        How; the code's defaults are 7 and ``max``.
    floor : int, optional
        Entries beside the window that every head is guaranteed (``floor_alpha`` times the base);
        by default a fifth of ``keep`` less the window, the code's 0.2.

    Notes
    -----
    Deviations from the official code:

    - One list of entries per KV head, by the mean over its query heads (the code's GQA branch does
      the same; its first version repeated keys to all query heads).
    - The budgets of a layer add up to ``H * keep`` exactly: remainders of rounding go to the heads
      with the largest fractions. The code rounds each head by itself.
    - The optional division by the mass that stays (``normalize``) is left out: off by default there.
    """
    base = keep - window
    return Recipe(
        name="adakv",
        compression=Compress(
            score=WindowAttention(window=window, pool=kernel, pooling=pooling),
            budget=Adaptive(keep=keep, floor=max(0, base) // 5 if floor is None else floor),
            act=Drop(),
        ),
    )
