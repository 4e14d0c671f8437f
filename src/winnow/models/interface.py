"""The two functions that Winnow registers with `transformers`: attention and its mask.

A model whose attention implementation is :data:`NAME` calls :func:`_attention` once per layer.
That function unpacks the call into the engine's form and hands it to the ``attend`` callable of the
surrounding :func:`attending`. (A context variable, not a keyword of the model's ``forward``: some
families do not pass unknown keywords down to their layers.) No mask is built: causality, sliding windows and
the limits of packed sequences are the business of ``attend``, which knows positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from winnow.types import Attend, AttentionSpec

__all__ = ["NAME", "UNBOUNDED", "attending", "windows_in_masks"]

# transformers looks for "flash", "sdpa" and "flex_attention" inside such names.
NAME = "winnow"

UNBOUNDED = 0
"""Marks a mask without a sliding window (see :func:`windows_in_masks`)."""

_attend: ContextVar[Attend | None] = ContextVar("winnow_attend", default=None)
_windows: ContextVar[list[int | None] | None] = ContextVar("winnow_windows", default=None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of `transformers`: ``[1, heads, N, D]`` in, ``[1, N, heads, D]`` out."""
    attend = _attend.get()
    if attend is None:
        raise ValueError(
            "this module belongs to Winnow and runs only through it; "
            "call model.set_attn_implementation('sdpa') to use it alone"
        )
    spec = AttentionSpec(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    windows = _windows.get()
    if windows is not None:
        windows.append(_read(attention_mask))
    elif attention_mask is not None:
        raise ValueError("a mask reached Winnow's attention; pass packed tokens and position_ids only")
    q_NHD, k_NHD, v_NHD = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return attend(layer, q_NHD, k_NHD, v_NHD, spec)[None], None


def _mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function of `transformers`: never a mask, and never a silently lost one."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("Winnow takes no padding mask; pack the sequences without padding instead")
    if _windows.get() is None:
        return None
    return torch.full((1, 1, q_length, kv_length), float(_window_of(mask_function)))


def _window_of(mask_function: Callable[..., Tensor]) -> int:
    """Window of an index-based mask, :data:`UNBOUNDED`, or -1 where it is neither causal nor a window."""
    zero = torch.tensor(0)

    def visible(query: int, key: int) -> bool:
        return bool(mask_function(zero, zero, torch.tensor(query), torch.tensor(key)))

    def first_visible(query: int) -> int:
        low, high = 0, query  # the visible keys of a window are an interval that ends at the query
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if visible(query, middle) else (middle + 1, high)
        return low

    # Two far queries tell a window (it moves with the query) from a chunk (it does not).
    far = 2**28 + 17
    windows = [query + 1 - first_visible(query) for query in (far, far + 1)]
    if visible(far, far + 1) or not visible(far, far):
        return -1
    if windows == [far + 1, far + 2]:
        return UNBOUNDED
    return windows[0] if windows[0] == windows[1] else -1


def _read(mask: Tensor | None) -> int | None:
    """The window that a mask of :func:`_mask` stands for; -1 for a mask made by somebody else."""
    if mask is None:
        return None
    low, high = (float(x) for x in mask.float().aminmax())
    return int(low) if low == high and math.isfinite(low) else -1


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Within this context (of this thread or task) models of ours attend through ``attend``."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


@contextmanager
def windows_in_masks() -> Iterator[list[int | None]]:
    """Collect, per attention call, the window of the mask that `transformers` would have used.

    Within this context masks are small tensors filled with the window that they stand for, so that
    a probe can compare it with the window that the attention function was told: only the latter
    survives. ``None`` where a layer got no mask at all, ``-1`` where the mask is no causal window.
    """
    windows: list[int | None] = []
    token = _windows.set(windows)
    try:
        yield windows
    finally:
        _windows.reset(token)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
