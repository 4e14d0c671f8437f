"""TidalDecode."""

from __future__ import annotations

from winnow.loading.tidal import Tidal
from winnow.recipe import Recipe

__all__ = ["tidal_decode"]


def tidal_decode(
    *, keep: int = 256, dense_layers: int = 2, select_layers: tuple[int, ...] | None = None
) -> Recipe:
    """TidalDecode: two layers choose the positions that the others read in a decode step.

    Paper: TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention
    (arXiv 2410.05076). Code: DerrickYLJ/TidalDecode, ``src/tidal_build/modify_llama.py``.

    Prefill is dense and every entry stays in memory: the method saves reads, not bytes. At 100K
    tokens, 32 layers and ``keep = 256`` a step reads about an eighth of the entries.

    Parameters
    ----------
    keep : int
        Positions per KV head that reusing layers read (``k``; the README's example has 256).
    dense_layers : int
        First layers that always read everything (``sparse_layer_start``).
    select_layers : tuple of int, or None
        Layers that read everything and choose. The code takes ``dense_layers`` and a *correction
        layer* that must be tuned per model (7, 9 and 13 occur). None takes ``dense_layers`` and two
        fifths of the depth, which is 13 of 32.

    Notes
    -----
    Deviations from the official code:

    - One list per KV head, by the largest logit among its query heads; the Python code selects
      per query head after repeating keys, and masks dense logits, which saves nothing.
    - The current token is always read; in the code it is missing where its logit ranks low.
    - Positions travel between layers, not entry numbers, so that the method works on a
      compressed cache: a layer reads those of the chosen positions that it still has.
    - In models with sliding windows, layers with a window read their window and never choose.
    """
    return Recipe(
        name="tidal-decode",
        loading=Tidal(keep=keep, dense_layers=dense_layers, select_layers=select_layers),
    )
