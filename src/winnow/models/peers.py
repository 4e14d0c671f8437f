"""The caches of `transformers`, as baselines to measure against."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache, StaticCache

__all__ = ["hf_cache"]


def hf_cache(module: nn.Module, kind: str, room: int) -> Any:
    """An empty cache of `transformers` for a model.

    Parameters
    ----------
    module : transformers.PreTrainedModel
    kind : {"dynamic", "static"}
        ``dynamic`` concatenates in every step; ``static`` reserves ``room`` entries.
    room : int
    """
    if kind == "dynamic":
        return DynamicCache(config=module.config)
    if kind == "static":
        return StaticCache(config=module.config, max_cache_len=room)
    raise ValueError(f"unknown cache {kind!r}; choose dynamic or static")
