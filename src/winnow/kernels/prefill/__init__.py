"""Attention of many new tokens over one segment: dense, window, block-sparse or stripes."""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose
from winnow.types import AttentionSpec, Dense, Form, Partial, Segment

from . import native, reference

__all__ = ["prefill"]

_DENSE = Dense()


def prefill(
    q_THD: Tensor,
    segment: Segment,
    *,
    spec: AttentionSpec,
    query_positions: Tensor,
    form: Form = _DENSE,
    want_row_max: bool = False,
    backend: Backend = "auto",
) -> Partial:
    """Attention of ``T`` queries over the entries of one segment.

    An entry is visible to a query iff its position is not greater, it lies in the model's
    sliding window, and ``form`` lists it. Sinks (``spec.sinks``) are not added here: they
    belong to the merged result, once.

    Parameters
    ----------
    q_THD : Tensor
        ``[T, H * G, D]`` post-RoPE queries, float32, float16 or bfloat16; the last dimension
        contiguous.
    segment : Segment
        Keys and values of the same dtype.
    spec : AttentionSpec
    query_positions : Tensor
        ``[T]`` int32 on the CPU, ascending.
    form : Dense, Window, Blocks or Stripes
    want_row_max : bool
        Also return the largest scaled logit of each row.
    backend : Backend

    Returns
    -------
    Partial
        ``out`` in the dtype of the queries.
    """
    chosen = choose("prefill", backend, q_THD.device, unsupported=native.unsupported(q_THD, segment, spec))
    if chosen == "native":
        return native.prefill(q_THD, segment, spec, query_positions, form, want_row_max)
    if chosen == "triton":
        from . import triton

        return triton.prefill(q_THD, segment, spec, query_positions, form, want_row_max)
    return reference.prefill(q_THD, segment, spec, query_positions, form, want_row_max)
