"""Merging in C++ (csrc/merge.cpp): one call in place of a dozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from winnow.kernels.backend import extension
from winnow.types import Partial

__all__ = ["merge", "unsupported"]

_DTYPES = (torch.bfloat16, torch.float32)


def unsupported(partials: Sequence[Partial]) -> str:
    """Why the native kernel cannot take these operands; empty where it can."""
    for p in partials:
        if p.out.dtype not in _DTYPES or p.lse.dtype != torch.float32:
            return f"results are {p.out.dtype} with log-sum-exps in {p.lse.dtype}"
        if not (p.out.is_contiguous() and p.lse.is_contiguous()):
            return "a result is not contiguous"
    return ""


def merge(partials: Sequence[Partial]) -> Partial:
    """As :func:`winnow.kernels.merge.merge`; the operands passed :func:`unsupported`."""
    first = partials[0]
    if any(p.out.shape != first.out.shape or p.lse.shape != p.out.shape[:2] for p in partials):
        raise ValueError("merge: partial results differ in shape; give each [T, H * G, D] and [T, H * G]")
    out, lse = torch.empty(first.out.shape), torch.empty(first.lse.shape)
    native = extension()
    assert native is not None
    native.merge(
        [(p.out.data_ptr(), p.out.dtype == torch.bfloat16, p.lse.data_ptr()) for p in partials],
        lse.numel(),
        out.shape[2],
        out.data_ptr(),
        lse.data_ptr(),
    )
    return Partial(out=out, lse=lse, pairs=sum(p.pairs for p in partials))
