"""A-shape."""

from __future__ import annotations

from winnow.generation.a_shape import AShape
from winnow.recipe import Recipe

__all__ = ["a_shape"]


def a_shape(*, init: int = 128, local: int = 3968) -> Recipe:
    """A-shape prefill: the first tokens and a sliding window, in every layer and head.

    Paper: StreamingLLM (arXiv 2309.17453) found the sinks; the prefill pattern is that of
    MInference (arXiv 2407.02490) and SCBench (arXiv 2412.10319).
    Code: microsoft/MInference, ``minference/ops/streaming_kernel.py`` (``a_shape_kernel``).

    Parameters
    ----------
    init : int
        First positions that every query reads (the code's ``n_init``).
    local : int
        Last positions that a query reads, its own included (the code's ``n_local``).

    Notes
    -----
    Deviations: none in the rule or the defaults. Prompts of at most ``init + local`` tokens are
    computed in full by the rule itself. Entries keep their true positions and all of them stay
    in the cache; StreamingLLM's cache, which drops entries and numbers the rest anew, is a
    different method.
    """
    return Recipe(name="a-shape", generation=AShape(init=init, local=local))
