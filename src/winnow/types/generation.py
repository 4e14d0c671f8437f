"""Generation: what a prefill computes over one segment."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from winnow.types.attention import Partial

__all__ = ["Blocks", "Dense", "Form", "Pattern", "Stripes", "Window"]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Every query reads every earlier entry."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The first ``init`` positions and the last ``local`` ones, the query's own included.

    Entry at position ``j`` is visible to a query at ``i`` iff ``j <= i`` and
    (``j < init`` or ``i - j < local``). With ``align`` above 1 the local part begins at the
    query's position rounded down to a multiple of ``align``, then ``local - align`` earlier.
    """

    init: int
    local: int
    align: int = 1


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block-sparse CSR per query head: which key blocks each query block reads.

    Query block ``r`` holds rows ``r * block .. r * block + block - 1`` of this call; key block
    ``c`` holds entries ``c * block .. c * block + block - 1`` of the segment. The causal mask
    is applied inside a block. Columns are ascending and unique within a row.

    Attributes
    ----------
    block : int
        Rows and columns of a block.
    offsets : Tensor
        ``[H * G, ceil(T / block) + 1]`` int32 into ``columns``.
    columns : Tensor
        ``[nnz]`` int32 key-block numbers.
    """

    block: int
    offsets: Tensor
    columns: Tensor


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """Single key columns shared by a run of queries (vertical stripes).

    Row ``t`` of this call reads the entries listed for super-block ``(t + phase) // rows``. The
    causal mask is applied.

    Attributes
    ----------
    rows : int
        Query rows that share a list.
    phase : int
        Rows of the first super-block that an earlier call already had (chunked prefill).
    offsets : Tensor
        ``[H * G, ceil((T + phase) / rows) + 1]`` int32 into ``columns``.
    columns : Tensor
        ``[nnz]`` int32 entry numbers, ascending and unique within a list.
    """

    rows: int
    phase: int
    offsets: Tensor
    columns: Tensor


Form = Dense | Window | Blocks | Stripes


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What a prefill computes over one segment.

    ``form`` is handed to the kernel. ``done`` is attention that the part already computed
    while choosing, over entries that ``form`` does not list; the two are merged. A part that
    needs nothing beyond ``done`` leaves ``form`` None. ``scored`` counts the query-key products
    that choosing took beside ``done`` (pooled queries count as queries).
    """

    form: Form | None
    done: Partial | None = None
    scored: int = 0
