"""AnchorAttention."""

from __future__ import annotations

from winnow.generation.anchor import Anchor
from winnow.recipe import Recipe

__all__ = ["anchor_attention"]


def anchor_attention(*, theta: float = 12.0, block: int = 128, step: int = 16, init: int = 128) -> Recipe:
    """AnchorAttention prefill: key columns whose score comes within ``theta`` of the largest local one.

    Paper: AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity (arXiv
    2505.23520, EMNLP 2025). Code: the Triton kernels released with it.

    Row maxima of attention almost always lie in the first tokens or in the local window. That
    maximum is the anchor; single key columns between the two regions are read by a run of
    queries iff a pooled query scores them close to it. No sorting, no softmax over the row.

    Parameters
    ----------
    theta : float
        Distance to the anchor in nats (the paper's ``theta``). Larger reads more; ``inf`` equals
        dense attention.
    block : int
        Queries pooled into one (``B``).
    step : int
        Pooled queries that share a list of columns (``s``): lists are per ``block * step`` tokens.
    init : int
        First positions that every query reads.

    Notes
    -----
    Deviations from the released code:

    - The initial region is ``init`` positions throughout. The code reads a whole super-block of
      2048 as initial but identifies from position 128 on, so it counts columns 128 to 2047
      twice; and it stops identifying one tile before the super-block, so 128 columns are never
      read. Both are errors: with ``theta = inf`` its result is not dense attention.
    - Anchors are compared in float32.
    - Any prompt length, several segments, and chunks that begin anywhere; chunked prefill equals
      whole prefill where chunks begin at multiples of ``block * step``.

    As in the code, every query head identifies its own columns.
    """
    return Recipe(name="anchor-attention", generation=Anchor(theta=theta, block=block, step=step, init=init))
