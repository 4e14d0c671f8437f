"""SwiftKV."""

from __future__ import annotations

from winnow.generation.swiftkv import SwiftKV
from winnow.recipe import Recipe

__all__ = ["swiftkv"]


def swiftkv(*, layers: int | None = None, group: int = 1, adapter: str | None = None) -> Recipe:
    """SwiftKV: prompt tokens skip the later layers, whose entries come from an earlier layer's output.

    Paper: SwiftKV: Fast Prefill-Optimized Inference with Knowledge-Preserving Model Transformation
    (arXiv 2410.03960). Code: snowflakedb/ArcticTraining, ``projects/swiftkv/train.py`` and
    ``projects/swiftkv/models/llama/modeling_llama_swiftkv.py``.

    The hidden states that leave the first ``layers`` layers are normalised once more; new matrices make
    the keys and values of every later layer of them (SingleInputKV), or of every group of later layers
    (AcrossKV), whose layers then read the same entries. Only rows that get logits, which are the last of
    a prompt and every decoded token, pass the later layers, with new query matrices.

    Parameters
    ----------
    layers : int or None
        Layers that every prompt token passes (``num_key_value_layers``); None is half of them.
    group : int
        Later layers that share entries (``key_value_group_size``).
    adapter : str or None
        What ``python -m winnow.models.swiftkv distill`` wrote for this model; None takes the file
        ``swiftkv.safetensors`` beside the model's weights where there is one of this form (the embedded
        model has one for half of its layers), else the start of distillation, without any training.

    Notes
    -----
    Deviations from the official code:

    - Llama-shaped models only (those of the fused runner); the code also transforms DeepSeek-V2.
    - The distillation loss of logits is the mean over the positions whose *next* token counts. The code
      (unless it runs sequence-parallel) masks by the labels of the positions themselves, so that the
      first token of a reply is not learnt and what follows its last one is; and it divides by all
      positions, those that are masked out included. Ours is computed from log-probabilities on both
      sides; the code takes the logarithm of a softmax that may have become zero.
    - Norm, queries, keys and values start as in the code: from layer ``layers``, from each layer, and
      from the mean over each group.
    - Compression and loading decide once for a group, by its first layer's queries: its layers read
      one set of entries. In the later layers only the prompt's last query is seen.
    """
    return Recipe(name="swiftkv", generation=SwiftKV(layers=layers, group=group, adapter=adapter))
