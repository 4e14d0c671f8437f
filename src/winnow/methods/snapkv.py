"""SnapKV."""

from __future__ import annotations

from typing import Literal

from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.recipe import Recipe

__all__ = ["snapkv"]


def snapkv(
    *, keep: int = 1024, window: int = 32, kernel: int = 5, pooling: Literal["avg", "max"] = "avg"
) -> Recipe:
    """SnapKV: the last prompt queries vote on which earlier entries stay.

    Paper: SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469).
    Code: FasterDecoding/SnapKV, ``snapkv/monkeypatch/snapkv_utils.py``.

    Acts once, at the end of the first prefill. Nothing is dropped while decoding.

    Parameters
    ----------
    keep : int
        Entries per KV head that stay, the window included (the code's ``max_capacity_prompt``).
        A prompt of no more tokens is left alone.
    window : int
        Last prompt tokens whose queries vote and which stay themselves (``window_size``).
    kernel : int
        Neighbours over which votes are pooled (``kernel_size``), odd.
    pooling : {"avg", "max"}
        How (``pooling``). The code's defaults are 5 and ``avg``; its LongBench runs used 7 and
        ``max``.

    Notes
    -----
    Deviations from the official code:

    - One list of entries per KV head, by the mean over its query heads after pooling. The code
      repeats keys and values to all query heads before it caches them, so that its cache holds
      ``G`` times as many entries for the same ``keep``.
    - Average pooling divides by the neighbours that exist; the code counts zero padding and damps
      the entries at both ends.
    - Votes are summed in float32. Sequences are never padded, so that the code's fault of
      dropping the batch's attention mask cannot occur.
    - Among equal votes at the limit the later entry stays; the code leaves it to ``topk``.
    """
    return Recipe(
        name="snapkv",
        compression=Compress(
            score=WindowAttention(window=window, pool=kernel, pooling=pooling),
            budget=Uniform(keep=keep),
            act=Drop(),
        ),
    )
