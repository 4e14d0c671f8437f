"""Decode attention over keys that are stored as a product of two thin matrices.

Each key that is read is rebuilt and turned to its position on the way; keys are never written anywhere.
"""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose, extension
from winnow.types import AttentionSpec, Factors, Partial, Segment, Selection

from . import native, reference
from .form import Turning, turning

__all__ = ["Turning", "is_fast", "rebuilt_decode", "turning"]


def is_fast(q_HD: Tensor, stored: Segment, factors: Factors, spec: AttentionSpec, backend: Backend) -> bool:
    """Whether the native kernel would run. Where it would not, rebuilding first is the faster way."""
    if backend not in ("auto", "native") or q_HD.device.type != "cpu" or extension() is None:
        return False
    return not native.unsupported(q_HD, stored, factors, spec)


def rebuilt_decode(
    q_HD: Tensor,
    stored: Segment,
    factors: Factors,
    turned: Turning,
    *,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None = None,
    want_logits: bool = False,
    backend: Backend = "auto",
) -> Partial:
    """As :func:`winnow.kernels.decode.decode`, over keys that are a product.

    Parameters
    ----------
    q_HD : Tensor
        ``[H * G, D]`` post-RoPE queries.
    stored : Segment
        Its values; its ``k`` is not read and may be any tensor of the same shape.
    factors : Factors
        The keys before rotation, in the dtype of the queries; a row for every position of ``stored``.
    turned : Turning
        What :func:`turning` makes of ``factors.rotary``, for the same positions.
    spec, position, selection, want_logits, backend
        As in ``decode``. There is no Triton kernel.

    Returns
    -------
    Partial

    Raises
    ------
    ValueError
        If the operands do not fit, or the backend cannot run.
    """
    if backend == "triton":
        raise ValueError("rebuilt_decode: there is no Triton kernel; rebuild the keys first")
    if backend == "auto" and q_HD.device.type != "cpu":
        backend = "reference"
    why = native.unsupported(q_HD, stored, factors, spec)
    if choose("rebuilt_decode", backend, q_HD.device, unsupported=why) == "native":
        return native.rebuilt_decode(q_HD, stored, factors, turned, spec, position, selection, want_logits)
    return reference.rebuilt_decode(q_HD, stored, factors, spec, position, selection, want_logits)
