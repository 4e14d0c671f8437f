"""H2O."""

from __future__ import annotations

from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.accumulated import Accumulated
from winnow.recipe import Recipe

__all__ = ["h2o"]


def h2o(*, heavy: int = 512, recent: int = 512, every: int = 32) -> Recipe:
    """H2O: the heavy hitters of all attention so far stay, and the recent tokens.

    Paper: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models
    (arXiv 2306.14048). Code: FMInference/H2O, ``h2o_hf/utils_real_drop/modify_llama.py``.

    Scores are attention probabilities summed over every query of prefill and decode. Acts at the end
    of every prefill and while decoding, so that the cache stays bounded. The sums of the prefill take
    a second pass over its scores (without the values): half of an attention more.

    Parameters
    ----------
    heavy : int
        Entries per KV head that stay for their score (``hh_size``; the code's ratio is 0.1 of the
        prompt).
    recent : int
        Last entries that stay whatever their score (``recent_size``, 0.1).
    every : int
        Decoded tokens between two cuts.

    Notes
    -----
    Deviations from the official code:

    - Sums are over the query heads of a KV head (one list per KV head). The code repeats keys first.
    - A head is cut when it holds ``every`` entries more than its budget, not at each step; ``every=1``
      is the code's behaviour. Scores go on every step.
    - Keys keep the rotation of their true positions (the code's plain class; its streaming class
      rotates by cache index, as ``streaming-llm`` does).
    - The lm-eval variant of the repository ranks with sums over the whole text, which sees the
      future, and masks instead of dropping; nothing of it is here.
    """
    return Recipe(
        name="h2o",
        compression=Compress(
            score=Accumulated(recent=recent),
            budget=Uniform(keep=heavy + recent),
            act=Drop(),
            turns="every",
            every=every,
        ),
    )
