"""StreamingLLM."""

from __future__ import annotations

from winnow.compression.actions.slide import Slide
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.recipe import Recipe

__all__ = ["streaming_llm"]


def streaming_llm(*, sinks: int = 4, recent: int = 2000, every: int = 32, block: int = 512) -> Recipe:
    """StreamingLLM: the first tokens and a sliding window, with positions counted in the cache.

    Paper: Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453).
    Code: mit-han-lab/streaming-llm, ``streaming_llm/kv_cache.py`` and ``streaming_llm/pos_shift``.

    Shared by all heads and layers; acts after every block of a prompt and while decoding, so the
    cache is bounded from the first token on.

    Parameters
    ----------
    sinks : int
        First tokens that stay (``start_size``).
    recent : int
        Last tokens that stay (``recent_size``).
    every : int
        Decoded tokens between two cuts; the code cuts at every step (1).

    block : int
        Prompt tokens that are read before the cache is cut again (1 in the code).

    Notes
    -----
    Deviations from the official code:

    - Keys are stored rotated. What slides along with the window are the sinks, turned to the positions
      right before it (``Slide``); relative positions equal those of the code's cache indices.
    - Between two cuts a head holds up to ``every`` entries more. Inside a prompt it is ``block``: a block
      sees what was kept and itself whole.
    - The sinks of a layer without rotation stay as they are.
    """
    return Recipe(
        name="streaming-llm",
        compression=Compress(
            score=Recency(sinks=0),
            budget=Uniform(keep=sinks + recent),
            act=Slide(sinks=sinks),
            turns="every",
            every=every,
            block=block,
        ),
    )
