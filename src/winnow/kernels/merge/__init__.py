"""Exact merging of attention over disjoint sets of entries, by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.kernels.backend import Backend, choose
from winnow.types import Partial

from . import native, reference

__all__ = ["add_sinks", "merge"]


def merge(partials: Sequence[Partial], *, backend: Backend = "auto") -> Partial:
    """Merge partial results over disjoint entries into one.

    Parameters
    ----------
    partials : sequence of Partial
        At least one, all of the same ``[T, H * G, D]``.
    backend : Backend
        There is no Triton kernel: on a GPU the reference runs.

    Returns
    -------
    Partial
        ``out = sum_p exp(lse_p - lse) out_p`` in float32 (a single partial is returned as it
        is). ``row_max`` and ``logits`` do not survive a merge of several.
    """
    if len(partials) == 1:
        return partials[0]
    device = partials[0].out.device
    if backend == "triton":
        raise ValueError("merge: there is no Triton kernel; use backend='auto'")
    if backend == "auto" and device.type != "cpu":
        backend = "reference"
    if choose("merge", backend, device, unsupported=native.unsupported(partials)) == "native":
        return native.merge(partials)
    return reference.merge(partials)


def add_sinks(partial: Partial, sinks_H: Tensor) -> Partial:
    """Add one virtual entry of value zero and logit ``sinks_H`` ``[H * G]`` to every row."""
    sinks_H = sinks_H.float()
    lse_TH = torch.logaddexp(partial.lse, sinks_H)
    out_THD = partial.out.float() * torch.exp(partial.lse - lse_TH).unsqueeze(-1)
    return Partial(out=out_THD, lse=lse_TH, pairs=partial.pairs)
