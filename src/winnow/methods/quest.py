"""Quest."""

from __future__ import annotations

from winnow.loading.page_bounds import PageBounds
from winnow.recipe import Recipe

__all__ = ["quest"]


def quest(*, keep: int = 1024, page: int = 16, dense_layers: int = 2) -> Recipe:
    """Quest: read the pages whose keys could match the query best.

    Paper: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (arXiv 2406.10774).
    Code: mit-han-lab/quest, ``evaluation/quest_attention.py`` and ``quest/``.

    Acts in every decode step. Everything stays stored; a step reads two vectors per page and the
    entries of the chosen pages.

    Parameters
    ----------
    keep : int
        Entries per KV head that a step reads (the token budget; 512 to 4096 in the paper).
    page : int
        Entries of a page (``chunk_size``; 16).
    dense_layers : int
        First layers that read everything (2).

    Notes
    -----
    Deviations from the official code:

    - One list of pages per KV head, by the largest bound of its query heads: a page is loaded once
      for the group. The code chooses per query head on expanded keys.
    - The page of the current token is always read; the evaluation code lets it compete.
    - Layers are counted from the first; the evaluation patch counts down from 32.
    """
    return Recipe(name="quest", loading=PageBounds(keep=keep, page=page, dense_layers=dense_layers))
