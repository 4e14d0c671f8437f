"""LazyEviction."""

from __future__ import annotations

from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recurrence import Recurrence
from winnow.recipe import Recipe

__all__ = ["lazy_eviction"]


def lazy_eviction(*, keep: int = 1024, window: int = 128, alpha: float = 5e-4) -> Recipe:
    """LazyEviction: evict late, and keep what attention keeps coming back to.

    Paper: LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long
    Reasoning (arXiv 2506.15969). Code: Halo-949/LazyEviction, ``model/temp_cacheobs.py``; it was not
    at hand, the formulas come from descriptions of it.

    Acts while decoding only, once per ``window`` tokens: a head that holds more than ``keep`` entries
    goes back to ``keep``, the last ``window`` among them. Meant for long outputs: until the first cut
    each step also watches everything there is, which costs about a tenth of full attention's time (1.11 with
    8192 entries, 0.99 with 32768); once 1024 are left, attention takes 0.45 and 0.12 of it
    (``winnow bench attached``, weights aside).

    Parameters
    ----------
    keep : int
        Entries per KV head after a cut (``B``); up to ``window`` more before the next.
    window : int
        Tokens between two cuts, and newest entries that stay (``W``). The paper takes the 80th
        percentile of the pauses that it sees on a sample (about 175 on MATH-500).
    alpha : float
        Attention from which an entry counts as active: 5e-4 for Llama, 1e-4 for Qwen models.

    Notes
    -----
    Deviations:

    - One decision per KV head: an entry is active where the mean over the query heads of its group
      reaches ``alpha``. The code repeats keys to all query heads and decides for each.
    - The paper's formula of the second term is written in three ways in the texts at hand; the form
      here (``2 sigmoid(1 - MRI)`` where ``MRI > 0``) is the one for which shorter pauses rank higher,
      as the text intends.
    - Numbers that are kept are integers: two of 4 bytes per entry and head.
    """
    return Recipe(
        name="lazy-eviction",
        compression=Compress(
            score=Recurrence(alpha=alpha, recent=window),
            budget=Uniform(keep=keep),
            act=Drop(),
            turns="none",
            every=window,
        ),
    )
