"""Positions: how far they may go before rotary frequencies change, and the frequencies themselves."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["frequencies", "position_limit", "use_long_regime"]

_log = logging.getLogger("winnow.models")
# Scalings that choose frequencies by the longest position of a call.
_BY_LENGTH = ("dynamic", "longrope")
# A store reserves addresses for as many positions as a model takes, so "no limit" is a number too.
_UNLIMITED = 2**20


def _parameters(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters of a text configuration: one dictionary, or one per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or ([rope] if rope else [])


def position_limit(config: Any, *, long_positions: bool = False) -> int:
    """Positions below which every rotary frequency is a constant.

    ``dynamic`` and ``longrope`` scaling choose frequencies by the longest position of a call. Keys
    turned in one regime must not meet queries of the other, and packed sequences would influence
    each other, so such a model stays in one regime. The first ends for ``dynamic`` at
    ``max_position_embeddings`` and for ``longrope`` at ``original_max_position_embeddings``, unless
    :func:`use_long_regime` was applied (``long_positions``).
    """
    limit = int(getattr(config, "max_position_embeddings", None) or _UNLIMITED)
    for parameters in _parameters(config):
        short = int(parameters.get("original_max_position_embeddings") or limit)
        if parameters.get("rope_type") == "longrope" and short < limit and not long_positions:
            _log.warning(
                "longrope changes its frequencies after %d positions: max_length is %d, not %d; "
                "long_positions=True uses those of long prompts throughout",
                short,
                short,
                limit,
            )
            limit = short
    return limit


def use_long_regime(model: PreTrainedModel) -> None:
    """Give a longrope model the frequencies of long prompts at every length, in its own buffers.

    Its logits then equal those that `transformers` gives for prompts beyond
    ``original_max_position_embeddings``; shorter prompts get the same frequencies, not the short ones.

    Raises
    ------
    ValueError
        If the model has no longrope scaling, or one per layer type.
    """
    turned = 0
    for module in model.modules():
        if getattr(module, "rope_type", None) != "longrope":
            continue
        original = module.config.rope_parameters["original_max_position_embeddings"]
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
            module.config, module.inv_freq.device, seq_len=original + 1
        )
        # transformers picks between these two by length; both are now the long ones.
        module.inv_freq.copy_(frequencies)
        module.original_inv_freq.copy_(frequencies)
        turned += 1
    if not turned:
        raise ValueError("long_positions is for models with longrope scaling; leave it out")


def frequencies(rotary: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies ``[D / 2]`` (float32) and the factor on cosines of a rotary module.

    Raises
    ------
    ValueError
        If the frequencies depend on the length, differ between layers, or cover part of a head.
    """
    kind = getattr(rotary, "rope_type", None)
    if not isinstance(kind, str) or kind in _BY_LENGTH:
        raise ValueError(
            f"rotary scaling {kind!r} is not constant over layers and lengths; use runner='general'"
        )
    inverse: Tensor = rotary.inv_freq
    if inverse.numel() * 2 != head_dim:
        raise ValueError(
            f"rotary embedding turns only {inverse.numel() * 2} of {head_dim} dimensions; "
            "use runner='general'"
        )
    return inverse.float().clone(), float(rotary.attention_scaling)
