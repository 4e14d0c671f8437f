"""What the store expects of a codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.types import AttentionSpec, Partial, Selection

if TYPE_CHECKING:
    from winnow.store.codecs.encoded import EncodedSegment

__all__ = ["ENTRIES", "Codec", "Decoded", "Plane", "bytes_per_entry"]

ENTRIES = 64
"""Entries of a page: the unit that is encoded, demoted and moved."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One table that a codec keeps beside the others.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
    width : int
        Elements of a row.
    entries : int
        Entries that share a row: 1, or :data:`ENTRIES` for what a page has once.
    once : bool
        The pages of a head that are encoded together hold one row between them (``entries`` is
        :data:`ENTRIES`): :meth:`Codec.encode` returns one row, :meth:`Codec.decode` is given one per
        page, as of any other plane.
    stays : bool
        The plane stays on the tier where attention runs when its run moves to a slower one.
    index : bool
        A selector reads the plane to choose; reading an entry does not.
    """

    name: str
    dtype: torch.dtype
    width: int
    entries: int = 1
    once: bool = False
    stays: bool = False
    index: bool = False


class Codec(Protocol):
    """How entries are stored. Stateless; equal names are equal forms."""

    @property
    def name(self) -> str:
        """As recipes and files write it, parameters included."""
        ...

    @property
    def channels(self) -> int | None:
        """How many channels of the keys are stored, for codecs that leave some out; else None."""
        ...

    @property
    def key_rank(self) -> int | None:
        """Rank of :class:`winnow.types.Factors`, for codecs that store keys as a product; else None.

        The store keeps the factors beside the planes, once per run, the left one once for all heads.
        :meth:`decode` is given two more tables behind the planes' rows, ``left [..., n, r]`` and
        ``right [..., r, D]``, and its keys are turned to their positions by the caller.
        """
        ...

    def planes(self, head_dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        """The tables that hold entries of ``head_dim`` values of ``dtype``.

        Raises
        ------
        ValueError
            If the codec cannot store entries of this size.
        """
        ...

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Rows ``[n / entries, width]`` for ``[n, D]`` K and V of one head; ``n`` is whole pages.

        Parameters
        ----------
        k, v : Tensor
        channels : Tensor or None
            ``[C]`` int64, ascending: the channels of the keys to store. None leaves the choice to the
            codec, which must then reproduce keys that it decoded before.
        """
        ...

    def decode(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V ``[..., n, D]`` in ``dtype`` of rows ``[..., n / entries, width]``."""
        ...

    def attend(
        self,
        q_HD: Tensor,
        segment: EncodedSegment,
        *,
        spec: AttentionSpec,
        position: int,
        selection: Selection | None,
        want_logits: bool,
        backend: Backend,
    ) -> Partial | None:
        """Decode attention over the stored form itself, as :func:`winnow.kernels.decode.decode`.

        None where the codec has no such path (or not for these operands): the caller then attends
        over what :meth:`EncodedSegment.tiles` and :meth:`EncodedSegment.gather` decode.
        """
        ...


class Decoded:
    """Defaults of a codec that stores all channels and that attention reads decoded."""

    channels: int | None = None
    key_rank: int | None = None

    def attend(
        self,
        q_HD: Tensor,
        segment: EncodedSegment,
        *,
        spec: AttentionSpec,
        position: int,
        selection: Selection | None,
        want_logits: bool,
        backend: Backend,
    ) -> Partial | None:
        """None: decode first."""
        return None


def bytes_per_entry(codec: Codec, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that one entry (K and V of one head) takes, rounded up to whole bytes.

    Rows that pages share however many they are (:attr:`Plane.once`) are not in it.
    """
    page = sum(
        p.width * p.dtype.itemsize * (ENTRIES // p.entries)
        for p in codec.planes(head_dim, dtype)
        if not p.once
    )
    return -(-page // ENTRIES)
