"""Compression: scores, budgets, and what becomes of the entries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from winnow.types.attention import Tier
from winnow.types.observation import Rotary

__all__ = ["Budget", "Demotion", "Factors", "Plan", "Rewrite", "Scores"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Importance of every entry of one layer.

    Attributes
    ----------
    value : Tensor
        ``[H, S]`` float32; ``-inf`` behind the end of a shorter head.
    protected : Tensor
        ``[H, S]`` bool: kept whatever its score. A mask, never a large score.
    lengths : Tensor
        ``[H]`` int32 valid entries per head.
    """

    value: Tensor
    protected: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many entries each KV head of one layer may hold: ``[H]`` int32."""

    entries: Tensor


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """New contents for some entries of one head: merged ones, and ones that stand for the dropped.

    Attributes
    ----------
    entries : Tensor
        ``[m]`` int64 entry numbers before the plan, ascending and unique; all of them stay.
    k, v : Tensor
        ``[m, D]``. An entry keeps its position.
    bias : Tensor or None
        ``[m]`` float32 added to the entry's scaled logits from now on; None leaves it as it was.
    """

    entries: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Keys of a layer, before rotation, as a product of two matrices.

    The key of KV head ``h`` at position ``start + i``, turned back to position 0, is
    ``left[i] @ right[h]``.

    Attributes
    ----------
    left : Tensor
        ``[n, r]``, the same for all heads.
    right : Tensor
        ``[H, r, D]``.
    start : int
        Position of row 0 of ``left``.
    rotary : Rotary or None
        What turns the product to its position; None for a layer without rotation.
    """

    left: Tensor
    right: Tensor
    start: int
    rotary: Rotary | None


@dataclass(frozen=True, kw_only=True)
class Demotion:
    """Entries that change their form or their tier.

    Attributes
    ----------
    oldest : int
        This many of the oldest entries of every head that stay, a multiple of the page size.
    entries : tuple of Tensor, or None
        In place of ``oldest``: per head ``[n]`` int64 entry numbers before the plan, ascending, a
        multiple of the page size (it may differ between heads).
    codec : str or None
        Codec that they are encoded in; None leaves their form.
    tier : Tier or None
        Tier that they move to; None leaves them where they are.
    channels : Tensor or None
        ``[H, C]`` int64 channels of the keys that are stored, ascending, for codecs that leave
        channels out.
    factors : Factors or None
        The keys, for codecs that store them as a product; a row for every position that is listed.
    """

    oldest: int = 0
    entries: tuple[Tensor, ...] | None = None
    codec: str | None = None
    tier: Tier | None = None
    channels: Tensor | None = None
    factors: Factors | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of the entries of one layer: first rewritten, then dropped, then demoted.

    Attributes
    ----------
    keep : tuple of Tensor, or None
        Per head ``[n]`` int64 entry numbers that stay, ascending and unique; the others are
        dropped. None keeps everything.
    rewrite : tuple of (Rewrite or None), or None
        Per head new contents of entries that stay.
    demote : tuple of Demotion
        Sets of entries that share none.
    """

    keep: tuple[Tensor, ...] | None = None
    rewrite: tuple[Rewrite | None, ...] | None = None
    demote: tuple[Demotion, ...] = ()
