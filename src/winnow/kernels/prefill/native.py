"""Prefill attention in C++ (csrc/prefill.cpp): operands are checked here and handed over by address."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.types import AttentionSpec, Blocks, Dense, Form, Partial, Segment, Window

__all__ = ["prefill", "unsupported"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_DENSE, _WINDOW, _LISTS = range(3)


def unsupported(q_THD: Tensor, segment: Segment, spec: AttentionSpec) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    if q_THD.dtype not in _DTYPES:
        return f"queries are {q_THD.dtype}; it takes float32 and bfloat16"
    if segment.k.dtype != q_THD.dtype or segment.v.dtype != q_THD.dtype:
        return f"queries are {q_THD.dtype} but keys and values {segment.k.dtype} and {segment.v.dtype}"
    if q_THD.shape[-1] % 16:
        return f"the head size is {q_THD.shape[-1]}; it takes multiples of 16"
    if not spec.scale > 0:
        return f"the scale is {spec.scale}; it takes positive ones"
    for name, operand in (("queries", q_THD), ("keys", segment.k), ("values", segment.v)):
        if operand.device.type != "cpu":
            return f"the {name} lie on {operand.device}"
        if operand.stride(-1) != 1:
            return f"the last dimension of the {name} is not contiguous"
    return ""


def _int32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape != shape or tensor.dtype != torch.int32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; give int32 {shape} on cpu"
        )
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def prefill(
    q_THD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    query_positions: Tensor,
    form: Form,
    want_row_max: bool,
) -> Partial:
    """Attention of ``T`` queries over one segment; see :func:`winnow.kernels.prefill.prefill`.

    Raises
    ------
    ValueError
        If a shape or type contradicts another, or a list of ``form`` is out of order.
    """
    T, heads, D = q_THD.shape
    H, C, _ = segment.k.shape
    if segment.v.shape != segment.k.shape or segment.k.shape[2] != D or H == 0 or heads % H:
        raise ValueError(
            f"queries {tuple(q_THD.shape)}, keys {tuple(segment.k.shape)}, values {tuple(segment.v.shape)} "
            "do not go together; give [T, H * G, D] and twice [H, C, D]"
        )
    lengths = _int32("lengths", segment.lengths, (H,))
    q_positions = _int32("query_positions", query_positions, (T,))
    if int(lengths.max()) > C or int(lengths.min()) < 0:
        raise ValueError(
            f"lengths {lengths.tolist()} exceed the {C} reserved entries; give at most that many"
        )
    positions = None if segment.positions is None else _int32("positions", segment.positions, (H, C))
    bias = segment.bias
    if bias is not None:
        if bias.shape != (H, C) or bias.dtype != torch.float32:
            raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; give float32 {(H, C)}")
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()

    kind, init, local, align = _DENSE, 0, 0, 1
    rows, phase, unit = 1, 0, 1
    offsets, columns = None, None
    if isinstance(form, Window):
        kind, init, local, align = _WINDOW, form.init, form.local, form.align
        if init < 0 or local < 1 or align < 1:
            raise ValueError(f"{form} is impossible; give init >= 0, local >= 1 and align >= 1")
    elif not isinstance(form, Dense):
        kind = _LISTS
        if isinstance(form, Blocks):
            rows = unit = form.block
        else:
            rows, phase = form.rows, form.phase
        if rows < 1 or phase < 0:
            raise ValueError(f"{rows} rows to a list and phase {phase}; give rows >= 1 and phase >= 0")
        offsets = _int32("offsets", form.offsets, (heads, -(-(T + phase) // rows) + 1))
        columns = _int32("columns", form.columns, (form.columns.numel(),))

    out_THD = torch.empty(T, heads, D, dtype=q_THD.dtype)
    lse_TH = torch.empty(T, heads, dtype=torch.float32)
    max_TH = torch.empty(T, heads, dtype=torch.float32) if want_row_max else None
    native = extension()
    assert native is not None
    pairs: int = native.prefill(
        dtype=_DTYPES[q_THD.dtype],
        tokens=T,
        kv_heads=H,
        group=heads // H,
        depth=D,
        q=q_THD.data_ptr(),
        q_token=q_THD.stride(0),
        q_head=q_THD.stride(1),
        k=segment.k.data_ptr(),
        k_head=segment.k.stride(0),
        k_entry=segment.k.stride(1),
        v=segment.v.data_ptr(),
        v_head=segment.v.stride(0),
        v_entry=segment.v.stride(1),
        lengths=lengths.data_ptr(),
        query_positions=q_positions.data_ptr(),
        start=segment.start,
        positions=0 if positions is None else positions.data_ptr(),
        positions_head=0 if positions is None else positions.stride(0),
        bias=0 if bias is None else bias.data_ptr(),
        bias_head=0 if bias is None else bias.stride(0),
        scale=spec.scale,
        softcap=spec.softcap or 0.0,
        sliding=spec.window or 0,
        form=kind,
        init=init,
        local=local,
        align=align,
        rows=rows,
        phase=phase,
        unit=unit,
        offsets=0 if offsets is None else offsets.data_ptr(),
        offsets_head=0 if offsets is None else offsets.stride(0),
        columns=0 if columns is None else columns.data_ptr(),
        n_columns=0 if columns is None else columns.numel(),
        out=out_THD.data_ptr(),
        lse=lse_TH.data_ptr(),
        row_max=0 if max_TH is None else max_TH.data_ptr(),
    )
    return Partial(out=out_THD, lse=lse_TH, pairs=pairs, row_max=max_TH)
