"""GEAR."""

from __future__ import annotations

from typing import Literal

from winnow.compression.actions.demote import Demote
from winnow.compression.budgets.everything import Everything
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.recipe import Recipe

__all__ = ["gear"]


def gear(
    *, bits: Literal[2, 4] = 4, rank: int = 4, every: int = 64, recent: int = 0, outliers: bool = True
) -> Recipe:
    """GEAR: few bits, with the rounding error at low rank and the largest values exactly.

    Paper: GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM
    (arXiv 2403.05527). Code: opengear-project/GEAR, ``GenerationBench/GenerationTest/GEARLM``.

    Acts at the end of every prefill and again whenever ``every`` tokens were decoded; what is encoded
    is never encoded again. Spends time to save bytes: a decode step reads the codes as they lie, but low
    rank and outliers are arithmetic. On two cores attention over 8192 entries of the 1B shape takes 2.0 times
    full attention's time (``winnow bench attached``).

    Parameters
    ----------
    bits : {2, 4}
        Of the quantised part, grouped as KIVI groups (K by channel and page, V by token).
    rank : int
        Of the residual (4 in prefill, 2 while decoding).
    every : int
        Decoded tokens that stay as they are before they are encoded together (``streaming_gap``, 64),
        in whole pages of 64.
    recent : int
        Newest tokens that stay as they are at every action (none in the code).
    outliers : bool
        Keep the largest values exactly; False is the paper's GEAR-L.

    Notes
    -----
    Deviations from the official code:

    - One value at each end per channel of a page (K) and per token of a head (V): 3.1 % at a head size
      and a page of 64. The code takes a share of 2 %, whose count for K does not depend on the number of
      tokens, and for V runs over all heads.
    - One rank for prefill and decoded tokens. The right factors of the pages that are encoded together
      are stored once.
    - Groups are pages of 64 tokens (K) and 32 channels (V). Tokens that fill no page stay as they are;
      the code mishandles them. A constant group reproduces itself; the code divides by zero.
    - ``2^bits - 1`` levels at every width (the code's sparse functions use ``bits^2 - 1``).
    """
    codec = f"gear{'' if outliers else '-l'}{bits}:{rank}"
    return Recipe(
        name="gear",
        compression=Compress(
            score=Recency(sinks=0),
            budget=Everything(),
            act=Demote(codec=codec, recent=recent),
            turns="every",
            every=every,
        ),
    )
