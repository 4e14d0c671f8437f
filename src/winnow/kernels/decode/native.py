"""Decode attention in C++ (csrc/decode.cpp)."""

from __future__ import annotations

from torch import Tensor

from winnow.types import AttentionSpec, Partial, Segment, Selection

__all__ = ["decode", "unsupported"]


def unsupported(q_HD: Tensor, segment: Segment, spec: AttentionSpec) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    return "not written yet"


def decode(
    q_HD: Tensor,
    segment: Segment,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None,
    want_logits: bool,
) -> Partial:
    raise NotImplementedError
