"""D2O."""

from __future__ import annotations

from winnow.compression.actions.merge_similar import MergeSimilar
from winnow.compression.budgets.density import Density
from winnow.compression.protocol import Compress
from winnow.compression.scorers.accumulated import Accumulated
from winnow.recipe import Recipe

__all__ = ["d2o"]


def d2o(
    *,
    heavy: int = 512,
    recent: int = 512,
    every: int = 32,
    sinks: int = 4,
    smooth: float = 0.5,
    dense_first: int = 2,
    dense_last: int = 1,
) -> Recipe:
    """D2O: budgets by attention density over the layers, and merging in place of dropping.

    Paper: D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large
    Language Models (arXiv 2406.13035). Code: AIoT-MLSys-Lab/d2o, ``LLM_merge_new`` and
    ``modeling_llama3_new.py``.

    H2O's scores. Each layer's budget is fixed at the end of the first prefill; what goes is merged
    into the most similar entry that stays, if it is similar enough.

    Parameters
    ----------
    heavy : int
        Entries per KV head, on average over the layers, that stay for their score (``hh_ratio``; the
        example has 0.1).
    recent : int
        Last entries that stay whatever their score (``recent_ratio``, 0.1).
    every : int
        Decoded tokens between two cuts.
    sinks : int
        First tokens that always stay.
    smooth : float
        Weight of the old similarity threshold (``alpha``).
    dense_first : int
        First layers that keep everything: 0 and 1, as in the code.
    dense_last : int
        Last layers that do.

    Notes
    -----
    Deviations from the official code:

    - Merged keys and values are means with the paper's weights, which add up to 1. The code averages
      ``u_e k_e`` and so shrinks them.
    - Budgets of the layers add up to the total after clamping; the code's drift. A layer keeps room
      for what is protected.
    - An entry is merged or dropped for each KV head by itself. The code takes the mean of ``u`` over
      heads at equal rank in their lists of dropped entries, which are different tokens.
    - The threshold belongs to a sequence; in the code requests share it.
    - A head is cut when it holds ``every`` entries more than its budget; the code cuts at each step.
    """
    return Recipe(
        name="d2o",
        compression=Compress(
            score=Accumulated(recent=recent, sinks=sinks),
            budget=Density(
                keep=heavy + recent,
                dense_first=dense_first,
                dense_last=dense_last,
                least=recent + sinks + 1,
            ),
            act=MergeSimilar(smooth=smooth),
            turns="every",
            every=every,
        ),
    )
