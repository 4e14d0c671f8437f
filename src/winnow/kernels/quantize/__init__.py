"""Rounding entries to 8, 4 or 2 bits and back.

A value becomes ``(code - offset) * scale + zero``. Scale and zero are bfloat16 (not float16: keys of
any magnitude stay finite), and are rounded *outwards* before the codes are computed from them, so that
the only error left is at most half a scale. Their bytes count: a 4-bit group of 64 with scale and zero
takes 4.5 bits per value.

The axis says which values share a scale. ``token``: ``group`` consecutive channels of one token
(``group = D`` is one scale per token). ``channel``: ``group`` consecutive tokens of one channel, as KIVI
(arXiv 2402.02750) does for keys, whose outliers keep to a few channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import Backend, choose

from . import native, reference
from .form import Axis, Quantized, check_form, check_out

__all__ = ["Axis", "Quantized", "dequantize", "quantize"]


def quantize(
    x: Tensor,
    *,
    bits: int,
    axis: Axis,
    group: int,
    symmetric: bool = False,
    out: Quantized | None = None,
    backend: Backend = "auto",
) -> Quantized:
    """Round ``x`` to a few bits.

    Parameters
    ----------
    x : Tensor
        ``[..., n, D]`` floating, finite: that is the caller's to ensure, as checking would read
        everything twice. NaN or infinity make their group meaningless and touch no other.
        Magnitudes stay below 2^126.
    bits : {8, 4, 2}
    axis : {"token", "channel"}
        What shares a scale: channels of one token, or tokens of one channel.
    group : int
        How many of them; divides ``D`` or ``n``.
    symmetric : bool
        No zero point: half the metadata, and coarser where values lie to one side.
    out : Quantized or None
        Where to write: an earlier result of the same form, or views such as the rows of a page.
    backend : Backend

    Returns
    -------
    Quantized
        With ``abs(x - dequantize(...)) <= scale / 2``, up to the rounding of float32. Every
        backend and instruction set gives the same bits.

    Raises
    ------
    ValueError
        If the last group would be partial, the bits do not fill bytes, ``out`` has another form, or
        the backend cannot run.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"quantize takes floating values [..., n, D], got {x.dtype} {list(x.shape)}")
    check_form(x.shape[-2], x.shape[-1], bits, axis, group)
    if backend == "auto" and x.is_cuda and axis == "token" and group * bits % 8:
        backend = "reference"  # the Triton kernel writes whole bytes
    if out is not None:
        check_out(out, x.shape, bits, axis, group, symmetric)
    chosen = choose("quantize", backend, x.device, unsupported=native.quantize_unsupported(x, out))
    if chosen == "native":
        return native.quantize(x, bits, axis, group, symmetric, out)
    if chosen == "triton":
        from . import triton

        made = triton.quantize(x, bits, axis, group, symmetric)
    else:
        made = reference.quantize(x, bits, axis, group, symmetric)
    return made if out is None else out.copy_(made)


def dequantize(
    q: Quantized,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Values ``[..., n, D]`` of what :func:`quantize` made.

    Parameters
    ----------
    q : Quantized
        Its tensors may be views, such as a range of tokens of a larger table.
    dtype : torch.dtype
        float32 or bfloat16; ignored where ``out`` is given.
    out : Tensor or None
        Where to write, for a caller that decodes tile after tile into the same memory.
    backend : Backend

    Raises
    ------
    ValueError
        If ``out`` has another shape, or the backend cannot run.
    """
    shape = (*q.codes.shape[:-1], q.width)
    if out is not None:
        if out.shape != shape:
            raise ValueError(f"out has shape {list(out.shape)}, the values are {list(shape)}")
        dtype = out.dtype
    why = native.dequantize_unsupported(q, dtype, out)
    chosen = choose("dequantize", backend, q.codes.device, unsupported=why)
    if chosen == "reference":
        values = reference.dequantize(q, dtype)
        return values if out is None else out.copy_(values)
    out = torch.empty(shape, dtype=dtype, device=q.codes.device) if out is None else out
    if chosen == "native":
        native.dequantize(q, out)
    else:
        from . import triton

        triton.dequantize(q, out)
    return out
