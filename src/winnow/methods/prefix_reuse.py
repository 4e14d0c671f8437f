"""Prefix reuse."""

from __future__ import annotations

from winnow.recipe import Recipe
from winnow.retrieval.radix import Radix

__all__ = ["prefix_reuse"]


def prefix_reuse(*, page: int = 64, capacity_bytes: int = 1 << 30, codec: str = "raw") -> Recipe:
    """Prefix reuse: prompts that begin alike share the entries of what they have in common.

    Paper: RadixAttention, in SGLang: Efficient Execution of Structured Language Model Programs
    (arXiv 2312.07104). Code: sgl-project/sglang, ``python/sglang/srt/mem_cache/radix_cache.py``.

    Finished sequences go to a pool, a radix tree over their tokens; a new prompt takes the entries
    of its longest prefix there and computes only the rest. Reuse is exact: under dense prefill the
    result is the one that computing everything gives. The least recently used leaves go first.

    Parameters
    ----------
    page : int
        Prefixes are shared in whole pages of so many tokens (the code's ``page_size``).
    capacity_bytes : int
        Most memory that the pool may hold, in bytes.
    codec : str
        Form in which the pool, and a server's files, hold entries. ``raw`` is exact; ``int8``, ``int4`` and
        ``int2`` hold more in as many bytes, and reuse is then approximate and counted as such.

    Notes
    -----
    Deviations from the official code:

    - Entries are copied into the pool and lie in host memory; the code shares slots of one table
      on the device.
    - The name space includes the model and the generation part, so that entries of a sparse
      prefill never serve a dense one. Entries that were computed after a compression dropped
      others do not enter the pool.
    - The code's default page is one token.
    - ``codec`` has no counterpart there.
    """
    return Recipe(name="prefix-reuse", retrieval=Radix(page=page, capacity_bytes=capacity_bytes, codec=codec))
