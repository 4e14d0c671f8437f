"""ShadowKV."""

from __future__ import annotations

from winnow.compression.actions.factor_keys import FactorKeys
from winnow.compression.budgets.everything import Everything
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.loading.landmarks import Landmarks
from winnow.recipe import Recipe
from winnow.types import Tier

__all__ = ["shadowkv"]


def shadowkv(
    *, keep: int = 2048, rank: int = 160, outliers: int = 48, local: int = 4, tier: Tier | None = "disk"
) -> Recipe:
    """ShadowKV: keys at low rank, values on a slower tier, chunks chosen by landmarks.

    Paper: ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference (arXiv
    2410.21465). Code: bytedance/ShadowKV, ``models/kv_cache.py``.

    Acts at the end of the first prefill, then in every decode step: the keys of the chosen chunks are
    rebuilt and turned to their positions, their values read from the slower tier. Later prefills rebuild
    all keys. Spends time to save bytes.

    Parameters
    ----------
    keep : int
        Entries per KV head that a step reads of the compressed prompt, in chunks of 8
        (``sparse_budget``; 2048).
    rank : int
        Of the keys of a layer, all heads together, before rotation (160, for 1024 channels; choose it
        well below ``H * D``).
    outliers : int
        Chunks per head that stay as they are because their mean represents them worst (48).
    local : int
        Newest chunks of the prompt that stay as they are (4).
    tier : {"host", "disk"} or None
        Where values go. On a CPU the slower tier is the disk; None leaves them in memory.

    Notes
    -----
    Deviations from the official code:

    - The factors come from the Gram matrix in float64, with the singular values in the left one: the same
      subspace as the code's SVD in float32, without its peak of memory.
    - Entries move in whole pages of 64, so up to 7 chunks more than ``local``, and the rest of the prompt
      that fills no chunk, stay as they are (the code: the rest alone). Prompts whose old part is no longer
      than ``rank`` stay as they are.
    - No buffer of the values of the last step: on the disk tier the system's page cache is that buffer.
      Values are the same whether they come from it or from the disk.
    - The model's own scale in place of 1/sqrt(128). Layers with a sliding window read their window.
    - Generated tokens, and what later turns add, stay as they are, without the code's fixed buffer.

    Figures of one layer with 8 KV heads of 64, rank 160, 2048 entries read, bfloat16, one thread of a Zen 4
    core in CPU time: at 8192 tokens 4.8 MB in memory and 8.2 MB on disk in place of 16.8 MB, 9.5 MB read by
    a step in place of 16.8, 15.8 ms in place of 1.0; at 32768 tokens 15.8 MB and 34.1 MB in place of 67.2,
    12.6 MB read, 19.4 ms in place of 5.2. Since then a kernel rebuilds keys and attends to them at once:
    reading 1024 of 8192 entries takes it 1.2 ms in place of 6.5, and attention of the 1B shape on two cores
    2.2 times full attention's time (``winnow bench attached``; 5.4 before). The rebuilding does not grow with
    the length; the choice of chunks does. The end of the prefill takes 0.3 s a layer at 8192 tokens.
    """
    return Recipe(
        name="shadowkv",
        compression=Compress(
            score=Recency(sinks=0),
            budget=Everything(),
            act=FactorKeys(rank=rank, outliers=outliers, local=local, tier=tier),
        ),
        loading=Landmarks(keep=keep),
    )
