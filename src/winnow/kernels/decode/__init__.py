"""Attention of one new token over one segment: all of it, listed entries or listed pages."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from winnow.kernels.backend import Backend, choose
from winnow.types import AttentionSpec, Partial, Segment, Selection

from . import native, reference
from .reference import group_mass

__all__ = ["decode", "decode_mass", "group_mass"]


def decode(
    q_HD: Tensor,
    segment: Segment,
    *,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None = None,
    want_logits: bool = False,
    backend: Backend = "auto",
) -> Partial:
    """Attention of one query per head over the entries of one segment.

    Parameters
    ----------
    q_HD : Tensor
        ``[H * G, D]`` post-RoPE queries, float32, float16 or bfloat16.
    segment : Segment
        Keys and values of the same dtype.
    spec : AttentionSpec
        The model's sliding window applies; sinks are added to the merged result, not here.
    position : int
        Position of the query; entries after it are not visible.
    selection : Selection or None
        Entries or pages to read; None reads everything visible.
    want_logits : bool
        Also return the scaled logits ``[H * G, max(lengths)]``.
    backend : Backend

    Returns
    -------
    Partial
        With ``T = 1``: ``out`` ``[1, H * G, D]`` in the dtype of the queries. ``pairs`` counts
        query-entry products; entries read from memory are ``pairs / G`` for lists per KV head.
    """
    chosen = choose("decode", backend, q_HD.device, unsupported=native.unsupported(q_HD, segment, spec))
    if chosen == "native":
        return native.decode(q_HD, segment, spec, position, selection, want_logits)
    if chosen == "triton":
        from . import triton

        return triton.decode(q_HD, segment, spec, position, selection, want_logits)
    return reference.decode(q_HD, segment, spec, position, selection, want_logits)


def decode_mass(
    q_HD: Tensor,
    segment: Segment,
    *,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None = None,
    backend: Backend = "auto",
) -> tuple[Partial, Tensor]:
    """As :func:`decode`, and how much attention the queries of each KV head gave every entry.

    Parameters
    ----------
    q_HD, segment, spec, position, selection, backend
        As in :func:`decode`.

    Returns
    -------
    Partial
    Tensor
        ``[H, S]`` float32, ``S`` the longest head: ``sum over the group of exp(logit - lse)`` with the
        log-sum-exp over this segment, sinks left out; 0 where an entry was not read.
    """
    chosen = choose("decode", backend, q_HD.device, unsupported=native.unsupported(q_HD, segment, spec))
    if chosen == "native":
        return native.decode_mass(q_HD, segment, spec, position, selection)
    partial = decode(
        q_HD,
        segment,
        spec=spec,
        position=position,
        selection=selection,
        want_logits=True,
        backend=chosen,
    )
    assert partial.logits is not None
    return replace(partial, logits=None), group_mass(partial.logits, partial.lse[0], segment.heads)
