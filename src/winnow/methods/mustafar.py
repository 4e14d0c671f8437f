"""Mustafar."""

from __future__ import annotations

from winnow.compression.actions.demote import Demote
from winnow.compression.budgets.everything import Everything
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.recipe import Recipe

__all__ = ["mustafar"]


def mustafar(*, percent: int = 50, recent: int = 32, every: int = 64) -> Recipe:
    """Mustafar: leave out the smallest elements of every key and value, and attend over what is stored.

    Paper: Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference
    (arXiv 2505.22913). Code: dhjoo98/mustafar, ``models/llama_mustafar_Kt_Mag_Vt_Mag.py``.

    Acts at the end of every prefill and while decoding. Decoding reads packed values and bit masks; no
    zeros come from memory. Spends time to save bytes where attention is bound by arithmetic: on two cores
    over 8192 entries of the 1B shape 1.04 times full attention's time, over 32768, where reading counts for
    more, 0.84 (``winnow bench attached``).

    Parameters
    ----------
    percent : int
        Elements of each key and each value that are left out, of a hundred (50 or 70 in the paper).
    recent : int
        Newest tokens that stay whole (32).
    every : int
        Decoded tokens between two actions; whole pages of 64 tokens are packed (256 in the code).

    Notes
    -----
    Deviations from the official code:

    - Values and masks lie by token, for K as for V; the code has tiles of 64 tokens of a key's channel,
      for its GPU kernel. Every token keeps the same number, so nothing is padded to eights and no offsets
      are stored: at a half and a head size of 64 a key takes 72 bytes in place of 128, 76 in the code.
    - Exactly ``D - floor(D * percent / 100)`` elements of a vector stay, of equal ones the earlier. The
      code keeps one more, and all ties.
    - Magnitude alone decides (the code's default); its variants by queries are left out.
    """
    return Recipe(
        name="mustafar",
        compression=Compress(
            score=Recency(sinks=0),
            budget=Everything(),
            act=Demote(codec=f"mustafar:{percent}", recent=recent),
            turns="every",
            every=every,
        ),
    )
