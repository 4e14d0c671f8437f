"""RazorAttention."""

from __future__ import annotations

from winnow.compression.actions.compensate import Compensate
from winnow.compression.budgets.retrieval_heads import RetrievalHeads
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.recipe import Recipe

__all__ = ["razor_attention"]


def razor_attention(
    *,
    profile: str = "retrieval-heads.safetensors",
    induction: int = 14,
    echo: int = 1,
    sinks: int = 4,
    buffer: int = 4000,
    divisor: int = 5,
    every: int = 32,
) -> Recipe:
    """RazorAttention: retrieval heads keep everything, the others a window and one entry for the rest.

    Paper: RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (arXiv 2407.15891).
    Code: none is official; the vendor's is mindspore-ai/golden-stick,
    ``mindspore_gs/experimental/long_context_compress/razor_attention``.

    Which heads retrieve is found out once per model: ``winnow profile retrieval-heads MODEL``.
    Acts at the end of every prefill and while decoding. A head that does not retrieve keeps ``sinks``
    first entries, a window of ``max(buffer, N / divisor)`` at ``N`` tokens, and a compensation entry: the
    mean of all that is gone, whose logit gets the logarithm of their number.

    Parameters
    ----------
    profile : str
        Path of the profile; by default the file that the command writes.
    induction : int
        Percent of KV heads taken by their induction score (14).
    echo : int
        Percent taken by their echo score (1).
    sinks : int
        First entries that every head keeps (``N_0``).
    buffer : int
        Smallest window (``S_0``).
    divisor : int
        The window is at least the length over this (``C``).
    every : int
        Decoded tokens between two folds of what left the window into the compensation entry.

    Notes
    -----
    Deviations from the paper:

    - Heads are KV heads: the score of one is the largest of its query heads.
    - A window grows by up to ``every`` entries before it is cut.
    - Models without rotary positions (ALiBi) keep their heads by profile too; the paper's scope from weight
      norms is left out.

    Of the vendor's code nothing is followed where it differs: it freezes the compensation entry after the
    prefill and does not weight it, and its head search sees the future.
    """
    return Recipe(
        name="razor-attention",
        compression=Compress(
            score=Recency(sinks=sinks),
            budget=RetrievalHeads(
                induction=induction, echo=echo, sinks=sinks, buffer=buffer, divisor=divisor
            ),
            act=Compensate(),
            turns="every",
            every=every,
        ),
        profile=profile,
    )
