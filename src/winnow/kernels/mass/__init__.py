"""Attention mass: the probability that many queries together give each entry of one segment."""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose
from winnow.types import AttentionSpec, Segment

from . import native, reference

__all__ = ["mass"]


def mass(
    q_THD: Tensor,
    segment: Segment,
    *,
    spec: AttentionSpec,
    query_positions: Tensor,
    lse: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Column sums of the attention matrix.

    With ``p[t, n, s] = exp(logit[t, n, s] - lse[t, n])`` over the entries that are visible to
    query ``t`` (its own position and earlier, within the model's window), returns
    ``sum over t of p[t, n, s]``. The values are not read: it costs half of the attention.

    Parameters
    ----------
    q_THD : Tensor
        ``[T, H * G, D]`` post-RoPE queries, float32, float16 or bfloat16; the last dimension contiguous.
    segment : Segment
        Keys of the same dtype.
    spec : AttentionSpec
    query_positions : Tensor
        ``[T]`` int32 on the CPU, ascending.
    lse : Tensor
        ``[T, H * G]`` float32 log-sum-exp over all entries of the layer, sinks included; a query
        whose own is ``-inf`` saw nothing and gives nothing.
    backend : Backend

    Returns
    -------
    Tensor
        ``[H * G, S]`` float32, ``S`` the longest head; 0 behind the end of a shorter one.
    """
    chosen = choose("mass", backend, q_THD.device, unsupported=native.unsupported(q_THD, segment, spec))
    if chosen == "native":
        return native.mass(q_THD, segment, spec, query_positions, lse)
    if chosen == "triton":
        from . import triton

        return triton.mass(q_THD, segment, spec, query_positions, lse)
    return reference.mass(q_THD, segment, spec, query_positions, lse)
