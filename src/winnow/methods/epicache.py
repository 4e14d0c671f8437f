"""EpiCache."""

from __future__ import annotations

from typing import Literal

from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.sensitivity import Sensitivity
from winnow.compression.protocol import Compress
from winnow.compression.scorers.peak_attention import PeakAttention
from winnow.recipe import Recipe

__all__ = ["epicache"]


def epicache(
    *,
    keep: int = 2048,
    block: int = 2048,
    profile: str = "layer-sensitivity.safetensors",
    power: float = 1.1,
    heads: Literal["pair", "uniform"] = "pair",
) -> Recipe:
    """EpiCache: one small cache per topic of a long conversation, built block by block.

    Paper: EpiCache: Episodic KV Cache Management for Long Conversational Question Answering
    (arXiv 2509.17396). Code: apple/ml-epicache, ``model/wrapper.py``, ``attention/score.py``,
    ``utils/cluster.py``.

    The recipe is the compression: after every block of the prompt the text of an episode is read over
    the entries, and those that it attends to stay, so that memory never exceeds budget and block.
    ``llm.episodes(history)`` clusters a conversation, builds one such cache per topic and answers each
    question from the nearest one.

    Parameters
    ----------
    keep : int
        Entries per KV head on average over the model, after every block.
    block : int
        Tokens that are read before the cache is cut again.
    profile : str
        Path of the layers' sensitivity: ``winnow profile layer-sensitivity MODEL``.
    power : float
        Sharpness of the sharing over layers (1.1).
    heads : {"pair", "uniform"}
        Heads of a layer share its budget by scores, or hold the same number.

    Notes
    -----
    Deviations from the official code:

    - Budgets of the layers add up to the total after the smallest are raised; the code's exceed it.
    - The probe stands behind the last token of the block; the code places it on top of it.
    - Probabilities are in float32.
    - Without a probe text (the recipe on an ordinary prompt) the last 32 queries of each block stand in.
    - As in the code nothing is protected, sinks and a system prompt included.
    """
    return Recipe(
        name="epicache",
        compression=Compress(
            score=PeakAttention(),
            budget=Sensitivity(keep=keep, power=power, heads=heads),
            act=Drop(),
            block=block,
        ),
        profile=profile,
    )
