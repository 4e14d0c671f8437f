"""CacheBlend."""

from __future__ import annotations

from typing import Literal

from winnow.recipe import Recipe
from winnow.retrieval.blend import Blend

__all__ = ["cacheblend"]


def cacheblend(
    *,
    recompute: tuple[int, ...] = (15,),
    check_layer: int = 1,
    deviation: Literal["keys-and-values", "values", "keys"] = "keys-and-values",
    codec: str = "raw",
    separator: str | None = None,
    capacity_bytes: int = 1 << 30,
) -> Recipe:
    """CacheBlend: chunks are computed once, apart, and blended wherever a prompt puts them.

    Paper: CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion (arXiv
    2405.16444). Code: YaoJiayi/CacheBlend, ``vllm_blend/vllm/attention/backends/xformers.py`` and
    ``vllm_blend/vllm/model_executor/models/llama.py``; LMCache/LMCache,
    ``lmcache/v1/compute/blend/blender.py``.

    A prompt is given in chunks (:class:`winnow.Chunks`, or text with a separator). Chunks that the
    pool has are not prefilled: their keys are turned to where they stand now. Then layer 0 is computed
    for all chunk tokens, and the check layer's keys and values; the tokens whose keys and values differ
    most from what was stored are computed through the layers that are left, attending to everything at
    or before them. What follows the last chunk is prefilled over the result.

    Parameters
    ----------
    recompute : tuple of int
        Of every hundred chunk tokens, how many are computed behind the check layer (the paper's
        ``r``: 5 to 18, by default 15; the code's ``recomp_ratio``: 0.16). Several numbers that fall
        filter gradually, from layer to layer, the last holding for all deeper ones.
    check_layer : int
        The layer that compares (``check_layers``).
    deviation : {"keys-and-values", "values", "keys"}
        What is compared: both is the paper's KV deviation; the research code sums over values only,
        LMCache over keys only.
    codec : str
        Form in which the pool stores chunks, such as ``int4``.
    separator : str or None
        Text that ends a chunk (LMCache's ``blend_special_str``); None where prompts come as
        :class:`winnow.Chunks`.
    capacity_bytes : int
        Most memory that the pool may hold, in bytes.

    Notes
    -----
    Deviations from the official code:

    - A recomputed token sees what stands at or before its own position. The research code masks by
      the row among the recomputed tokens, aligned to the end, so that they see later ones.
    - The first chunk of a prompt is exact where the pool holds it raw: it is reused as it is, and
      counts neither among the tokens that are compared nor among those that the share is taken of.
    - Keys are stored turned, and turned on once by the distance, in float32 and without the factor
      that YaRN puts on its cosines; every form of rotation that the model's own layers show is taken,
      the code takes whole-head rotation without scaling. Models whose rotation depends on the length
      stay in one regime (see ``max_length``), so that tables never mix.
    - A chunk that the pool lacks is computed apart, behind a begin token, and then blended like the
      others, so that an answer does not depend on what was asked before. LMCache stores what the
      first prompt computed, with that prompt's context in it.
    - Repair is done for one sequence at a time; the layers' loading from slow storage behind the
      computation, and the controller that picks ``r`` by it, are left out: the pool lies in memory.
      Repaired rows use full attention, whatever the recipe computes in a prefill.
    - ``recompute=(0,)`` computes nothing again, in any layer: plain reuse at new positions.
    """
    return Recipe(
        name="cacheblend",
        retrieval=Blend(
            recompute=recompute,
            check_layer=check_layer,
            deviation=deviation,
            codec=codec,
            separator=separator,
            capacity_bytes=capacity_bytes,
        ),
    )
