"""PBS-Attn."""

from __future__ import annotations

from winnow.generation.permuted_blocks import PermutedBlocks
from winnow.recipe import Recipe

__all__ = ["pbs_attn"]


def pbs_attn(*, block: int = 128, segment: int = 256, share: float = 0.9) -> Recipe:
    """PBS-Attn: permute keys inside segments so that the important ones share blocks, then skip blocks.

    Paper: Sparser Block-Sparse Attention via Token Permutation (arXiv 2510.21270).
    Code: xinghaow99/pbs-attn, ``pbs_attn/src/pbs.py``, ``permute_states.py``, ``utils.py``.

    Acts in every prefill. The permuted copy lives for one layer; entries are stored in their order.

    Parameters
    ----------
    block : int
        Queries and keys of a block (``B``; 128).
    segment : int
        Keys that are permuted among themselves (``S``; 256). A query reads its own segment whole.
    share : float
        Share of the pooled attention that the chosen blocks reach (``tau``; 0.9).

    Notes
    -----
    Deviations from the official code:

    - Permutations belong to KV heads, by the mean importance over their query heads; the code makes
      a copy of keys and values per query head.
    - In a chunked prefill the importance comes from the last queries of each chunk.
    - A row whose cumulative sum misses the threshold by rounding still reads its best blocks; in the
      code it reads none. Masks are infinite, not -1e6.
    - Layers with a sliding window, and sequences that lost entries, read everything.
    """
    return Recipe(name="pbs-attn", generation=PermutedBlocks(block=block, segment=segment, share=share))
