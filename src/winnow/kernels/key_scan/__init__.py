"""Approximate logits of every entry from a quantised copy of its key, to choose what to read exactly.

A scan moves 132 bytes per entry and KV head at head size 128 with 8 bits, 68 with 4 bits; reading the
entry itself moves 512 in bfloat16.
"""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose

from . import native, reference
from .codes import BLOCK, Bits, KeyCodes
from .reference import Reduction

__all__ = ["BLOCK", "Bits", "KeyCodes", "Reduction", "key_scan", "quantize_keys"]


def quantize_keys(
    k_HCD: Tensor, begin_H: Tensor, end_H: Tensor, into: KeyCodes, *, backend: Backend = "auto"
) -> None:
    """Write the codes and scales of entries ``begin .. end - 1`` of every head, in place.

    Call it with the whole range after a prefill and with the new entries after each step.

    Parameters
    ----------
    k_HCD : Tensor
        ``[H, C, D]`` float32 or bfloat16 keys, the last dimension contiguous; ``C`` may differ from
        the capacity of ``into``.
    begin_H, end_H : Tensor
        ``[H]`` int32 on the CPU.
    into : KeyCodes
        Its other entries are left as they are.
    backend : Backend

    Raises
    ------
    ValueError
        If shapes do not fit or a range lies outside either reserve.
    """
    if k_HCD.dim() != 3 or k_HCD.shape[0] != into.codes.shape[0] or k_HCD.shape[2] != into.dim:
        raise ValueError(
            f"quantize_keys: keys {tuple(k_HCD.shape)} do not fit codes of "
            f"{into.codes.shape[0]} heads of size {into.dim}; pass [H, C, D]"
        )
    why = native.unsupported(k_HCD, into)
    chosen = choose("quantize_keys", backend, k_HCD.device, unsupported=why)
    if chosen == "native":
        native.quantize_keys(k_HCD, begin_H, end_H, into)
    elif chosen == "triton":
        from . import triton

        triton.quantize_keys(k_HCD, begin_H, end_H, into)
    else:
        reference.quantize_keys(k_HCD, begin_H, end_H, into)


def key_scan(
    q_HD: Tensor,
    keys: KeyCodes,
    lengths_H: Tensor,
    *,
    reduce: Reduction = "max",
    width: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Approximate products of one query per head with every key, reduced over each group.

    The query of each head is rounded to 8 bits by its own largest magnitude; products of codes are
    exact integers. The attention's ``scale`` is not applied: it does not change an order.

    Parameters
    ----------
    q_HD : Tensor
        ``[H * G, D]`` float32 or bfloat16 post-RoPE queries.
    keys : KeyCodes
    lengths_H : Tensor
        ``[H]`` int32 on the CPU, valid entries per head.
    reduce : {"max", "sum", "none"}
        Over the ``G`` query heads of a KV head.
    width : int or None
        Columns ``S`` of the result; None takes the longest head.
    backend : Backend

    Returns
    -------
    Tensor
        float32 ``[H, S]``, or ``[H * G, S]`` with ``reduce="none"``; ``-inf`` behind a head's length.

    Raises
    ------
    ValueError
        If shapes do not fit or a length lies outside the reserve.
    """
    heads = keys.codes.shape[0]
    if q_HD.dim() != 2 or not heads or q_HD.shape[0] % heads or q_HD.shape[1] != keys.dim:
        raise ValueError(
            f"key_scan: queries {tuple(q_HD.shape)} do not fit codes of {heads} heads of size {keys.dim}; "
            "pass [H * G, D]"
        )
    if width is None:
        width = max(lengths_H.tolist())
    chosen = choose("key_scan", backend, q_HD.device, unsupported=native.unsupported(q_HD, keys))
    if chosen == "native":
        return native.key_scan(q_HD, keys, lengths_H, reduce, width)
    if chosen == "triton":
        from . import triton

        return triton.key_scan(q_HD, keys, lengths_H, reduce, width)
    return reference.key_scan(q_HD, keys, lengths_H, reduce, width)
