"""Prefill attention in C++ (csrc/prefill.cpp)."""

from __future__ import annotations

from torch import Tensor

from winnow.types import AttentionSpec, Form, Partial, Segment

__all__ = ["prefill", "unsupported"]


def unsupported(q_THD: Tensor, segment: Segment, spec: AttentionSpec) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    return "not written yet"


def prefill(
    q_THD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    query_positions: Tensor,
    form: Form,
    want_row_max: bool,
) -> Partial:
    raise NotImplementedError
