"""Positions: how far they may go before rotary frequencies change, and the frequencies themselves."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

__all__ = ["frequencies", "position_limit", "rope_types"]

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


def rope_types(config: Any) -> set[str]:
    """Names of the rotary scalings that a text configuration uses; empty without rotary."""
    return {str(p.get("rope_type", "default")) for p in _parameters(config)}


def position_limit(config: Any) -> int:
    """Positions below which every rotary frequency is a constant.

    ``dynamic`` and ``longrope`` scaling choose frequencies by the longest position of a call. Keys
    turned in one regime must not meet queries of the other, and packed sequences would influence
    each other, so such a model runs in its short regime only. For ``dynamic`` that ends at
    ``max_position_embeddings``, for ``longrope`` at ``original_max_position_embeddings``.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or _UNLIMITED)
    for parameters in _parameters(config):
        short = int(parameters.get("original_max_position_embeddings") or limit)
        if parameters.get("rope_type") == "longrope" and short < limit:
            _log.warning(
                "longrope changes its frequencies after %d positions: max_length is %d, not %d",
                short,
                short,
                limit,
            )
            limit = short
    return limit


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
