"""Prefix reuse."""

from __future__ import annotations

from winnow.recipe import Recipe

__all__ = ["prefix_reuse"]


def prefix_reuse() -> Recipe:
    """Prefix reuse: prompts that begin alike share the entries of what they have in common.

    Paper: RadixAttention of SGLang (arXiv 2312.07104). Code: sgl-project/sglang,
    ``python/sglang/srt/mem_cache/radix_cache.py``.
    """
    from winnow.retrieval.radix import Radix

    return Recipe(name="prefix-reuse", retrieval=Radix())
