"""Decode attention over entries in 8, 4 or 2 bits: codes and their factors are all that is read.

The kernel never builds keys and values. Scales that entries share go into the query, scales that channels
share into logits and weights; what is left of a page are small integers, exact in bfloat16.
"""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose, extension
from winnow.types import AttentionSpec, Partial

from . import native, reference
from .form import PAGE, Coded, Codes, Extremes, Product

__all__ = ["PAGE", "Coded", "Codes", "Extremes", "Product", "coded_decode", "is_fast"]


def is_fast(q_HD: Tensor, coded: Coded, spec: AttentionSpec, backend: Backend) -> bool:
    """Whether the native kernel would run. Where it would not, decoding first is the faster way."""
    if backend not in ("auto", "native") or q_HD.device.type != "cpu" or extension() is None:
        return False
    return not native.unsupported(q_HD, coded, spec)


def coded_decode(
    q_HD: Tensor, coded: Coded, *, spec: AttentionSpec, position: int, backend: Backend = "auto"
) -> Partial:
    """As :func:`winnow.kernels.decode.decode`, over all visible coded entries.

    Parameters
    ----------
    q_HD : Tensor
        ``[H * G, D]`` post-RoPE queries.
    coded : Coded
    spec, position, backend
        As in ``decode``. There is no Triton kernel.

    Returns
    -------
    Partial
        What attention over the decoded entries gives, up to the rounding of scaled queries and weights to
        the dtype of the queries.

    Raises
    ------
    ValueError
        If the operands do not fit, or the backend cannot run.
    """
    if backend == "triton":
        raise ValueError("coded_decode: there is no Triton kernel; decode the entries first")
    if backend == "auto" and q_HD.device.type != "cpu":
        backend = "reference"
    why = native.unsupported(q_HD, coded, spec)
    if choose("coded_decode", backend, q_HD.device, unsupported=why) == "native":
        return native.coded_decode(q_HD, coded, spec, position)
    return reference.coded_decode(q_HD, coded, spec, position)
