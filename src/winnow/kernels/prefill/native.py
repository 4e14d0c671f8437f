"""Prefill attention in C++ (csrc/prefill.cpp): operands are checked here and handed over by address."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import extension
from winnow.kernels.operands import int32_on_cpu, queries_and_entries, unsupported
from winnow.types import AttentionSpec, Blocks, Dense, Form, Partial, Segment, Window

__all__ = ["prefill", "unsupported"]

_DENSE, _WINDOW, _LISTS = range(3)


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
    operands = queries_and_entries(q_THD, segment, spec, query_positions)
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
        offsets = int32_on_cpu("offsets", form.offsets, (heads, -(-(T + phase) // rows) + 1))
        columns = int32_on_cpu("columns", form.columns, (form.columns.numel(),))

    out_THD = torch.empty(T, heads, D, dtype=q_THD.dtype)
    lse_TH = torch.empty(T, heads, dtype=torch.float32)
    max_TH = torch.empty(T, heads, dtype=torch.float32) if want_row_max else None
    native = extension()
    assert native is not None
    pairs: int = native.prefill(
        **operands.arguments,
        v=segment.v.data_ptr(),
        v_head=segment.v.stride(0),
        v_entry=segment.v.stride(1),
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
