"""Decode attention in C++ (csrc/decode.cpp): validates, prepares addresses, calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.types import AttentionSpec, Partial, Segment, Selection

__all__ = ["call", "decode", "decode_mass", "longest", "unsupported"]

_DTYPES = (torch.bfloat16, torch.float32)


def unsupported(q_HD: Tensor, segment: Segment, spec: AttentionSpec) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    dim = q_HD.shape[1]
    if dim % 16 or not 16 <= dim <= 256:
        return f"head size {dim} is not a multiple of 16 up to 256"
    if q_HD.dtype not in _DTYPES:
        return f"{q_HD.dtype} is neither bfloat16 nor float32"
    if segment.k.dtype != q_HD.dtype or segment.v.dtype != q_HD.dtype:
        return "queries, keys and values differ in dtype"
    return ""


def _int32(t: Tensor, name: str) -> Tensor:
    if t.dtype != torch.int32 or t.stride(-1) != 1:
        raise ValueError(f"decode: {name} must be int32 and contiguous in its last dimension; convert it")
    return t


def decode(
    q_HD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    want_logits: bool,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Partial:
    """As :func:`winnow.kernels.decode.decode`; the operands passed :func:`unsupported`.

    With ``masks`` (``[H, C, D / 8]`` uint8 for K and for V) the rows of the segment hold only the values
    whose bits are set, as :func:`winnow.kernels.bitmap_decode.bitmap_decode` says.
    """
    logits_NS = None
    if want_logits:
        logits_NS = torch.full((q_HD.shape[0], longest(segment)), -torch.inf)
    partial = call(_native().decode, logits_NS, q_HD, segment, spec, position, selection, masks)
    return partial if logits_NS is None else replace(partial, logits=logits_NS)


def decode_mass(
    q_HD: Tensor, segment: Segment, spec: AttentionSpec, position: int, selection: Selection | None
) -> tuple[Partial, Tensor]:
    """As :func:`winnow.kernels.decode.decode_mass`; the operands passed :func:`unsupported`."""
    mass_HS = torch.zeros(segment.heads, longest(segment))
    return call(_native().decode_mass, mass_HS, q_HD, segment, spec, position, selection, None), mass_HS


def longest(segment: Segment) -> int:
    """Entries of the head that holds the most."""
    return max(segment.lengths.tolist(), default=0)


def _native() -> ModuleType:
    native = extension()
    assert native is not None
    return native


def call(
    entry: Callable[..., int],
    more: Tensor | None,
    q_HD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    masks: tuple[Tensor, Tensor] | None,
) -> Partial:
    """Attention; the kernel writes what ``entry`` gives beside it into ``more``."""
    heads, dim = q_HD.shape
    k, v, lengths = segment.k, segment.v, _int32(segment.lengths, "lengths")
    kv_heads, capacity, _ = shape = k.shape
    group, rest = divmod(heads, kv_heads) if kv_heads else (0, heads)
    k_head, k_row, k_last = k.stride()
    v_head, v_row, v_last = v.stride()
    size = dim if masks is None else shape[2]
    if rest or shape[2] != size or v.shape != shape or lengths.shape[0] != kv_heads:
        raise ValueError(
            f"decode: queries {tuple(q_HD.shape)}, keys {tuple(shape)}, values {tuple(v.shape)} and lengths "
            f"{tuple(lengths.shape)} do not fit; pass [H * G, D], [H, C, D], [H, C, D] and [H]"
        )
    if k_last != 1 or v_last != 1:
        raise ValueError("decode: the last dimension of keys and values must be contiguous; copy them")
    q_HD = q_HD.contiguous()

    positions = bias = None
    if segment.positions is not None:
        positions = _int32(segment.positions, "positions")
    if segment.bias is not None:
        bias = segment.bias
        if bias.dtype != torch.float32 or bias.stride(-1) != 1:
            raise ValueError("decode: bias must be float32 and contiguous in its last dimension; convert it")

    indices_ptr = counts_ptr = indices_row = listed = rows = 0
    page = 1
    if selection is not None:
        indices, counts = _int32(selection.indices, "indices"), _int32(selection.counts, "counts")
        (rows, listed), page = indices.shape, selection.page
        if rows not in (kv_heads, heads) or counts.shape[0] != rows:
            raise ValueError(
                f"decode: a selection of {rows} rows and {counts.shape[0]} counts; "
                f"give one list per KV head ({kv_heads}) or per query head ({heads})"
            )
        if listed == 0:
            # An empty tensor has the address 0, which to the kernel means "no selection".
            indices = indices.new_zeros(rows, 1)
        indices_ptr, counts_ptr, indices_row = indices.data_ptr(), counts.data_ptr(), indices.stride(0)

    out = torch.empty_like(q_HD)
    lse = torch.empty(1, heads)
    pairs = entry(
        q_HD.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        k_head,
        k_row,
        v_head,
        v_row,
        0 if masks is None else masks[0].data_ptr(),
        0 if masks is None else masks[1].data_ptr(),
        0 if masks is None else masks[0].stride(0),
        0 if masks is None else masks[1].stride(0),
        k.shape[2],
        capacity,
        lengths.data_ptr(),
        kv_heads,
        group,
        dim,
        q_HD.dtype == torch.bfloat16,
        position,
        segment.start,
        -1 if spec.window is None else spec.window,
        0 if positions is None else positions.data_ptr(),
        0 if positions is None else positions.stride(0),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else bias.stride(0),
        spec.scale,
        0.0 if spec.softcap is None else spec.softcap,
        indices_ptr,
        counts_ptr,
        indices_row,
        listed,
        rows,
        page,
        out.data_ptr(),
        lse.data_ptr(),
        0 if more is None else more.data_ptr(),
        0 if more is None else more.stride(0),
    )
    return Partial(out=out[None], lse=lse, pairs=pairs)
