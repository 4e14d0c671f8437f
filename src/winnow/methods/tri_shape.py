"""Tri-shape."""

from __future__ import annotations

from winnow.generation.tri_shape import TriShape
from winnow.recipe import Recipe

__all__ = ["tri_shape"]


def tri_shape(*, init: int = 128, local: int = 3968, last: int = 100) -> Recipe:
    """Tri-shape prefill: A-shape, and full attention for the last tokens of the prompt.

    Paper: SCBench (arXiv 2412.10319), which found it the best training-free sparse prefill when
    several questions share a context.
    Code: microsoft/MInference, ``minference/ops/streaming_kernel.py`` (``tri_shape_kernel``).

    Parameters
    ----------
    init : int
        First positions that every query reads (the code's ``n_init``).
    local : int
        Last positions that a query reads, its own included (the code's ``n_local``).
    last : int
        Last tokens of the prompt that read everything (the code's ``n_last``).

    Notes
    -----
    Deviations: the last tokens are those of the prompt, not of every prefill call, so chunks do
    not add dense rows; they are not given to a pool, because under a longer prompt they would
    have been computed through the window.
    """
    return Recipe(name="tri-shape", generation=TriShape(init=init, local=local, last=last))
