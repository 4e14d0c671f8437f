"""ThinK."""

from __future__ import annotations

from winnow.compression.actions.thin_keys import ThinKeys
from winnow.compression.budgets.everything import Everything
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.recipe import Recipe

__all__ = ["think"]


def think(*, percent: int = 40, keep: int = 0, recent: int = 32, window: int = 32) -> Recipe:
    """ThinK: old keys lose the channels that contribute least to the latest queries' scores.

    Paper: ThinK: Thinner Key Cache by Query-Driven Pruning (arXiv 2407.21018).
    Code: SalesforceAIResearch/ThinK, ``ThinK_eager/src/kv_pruning_utils.py``.

    Acts once, at the end of the first prefill, alone or after SnapKV's eviction. What remains of the
    keys is stored compactly and decoding reads it as it lies, with the same channels of the query; the
    scale of the scores stays that of all channels. Spends time to save bytes where attention is bound by
    arithmetic: on two cores over 8192 entries of the 1B shape 1.07 times full attention's time, over 32768,
    where reading counts for more, 0.85 (``winnow bench attached``).

    Parameters
    ----------
    percent : int
        Channels left out, of a hundred, rounded down (``ratio``).
    keep : int
        Entries per KV head that SnapKV keeps first, its window of 32 included; 0 keeps all.
    recent : int
        Newest entries that keep all channels (``recent_size``).
    window : int
        Last queries that decide (32 in the code).

    Notes
    -----
    Deviations from the official code:

    - One set of channels per KV head, by the mean of its query heads' squared norms. The code repeats
      keys to all query heads before it caches them.
    - Whole pages of 64 entries are thinned, so that up to 63 entries beside the ``recent`` ones keep all
      channels. Entries that are generated keep them too, as in the code.
    - Sums instead of means, in float32: the order of the channels is the same.
    - Values are never thinned; the paper has such a variant.

    Figures. Embedded model, 4096 tokens, six questions on each of six documents of ``winnow demo``:
    full attention 36 of 36 right, 25.4 MB stored, 25.3 MB read per step; ThinK 36 of 36, 20.9 MB and
    20.8 MB. Shape of Llama 3.2 1B, 8192 entries: 268 MB stored becomes 220 MB. It saves bytes, not time,
    where arithmetic is the limit: one layer's decode attention over 8192 entries took 1.28 ms instead of
    1.21 ms on one busy core, since the kernel multiplies as many channels as before; with 32 of 64
    channels 1.18 ms.
    """
    evict = keep > 0
    return Recipe(
        name="think",
        compression=Compress(
            score=WindowAttention() if evict else Recency(),
            budget=Uniform(keep=keep) if evict else Everything(),
            act=ThinKeys(percent=percent, recent=recent, window=window),
        ),
    )
