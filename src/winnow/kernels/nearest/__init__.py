"""For some rows of a matrix the most similar of others: a matrix product of which only maxima are kept."""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose

from . import native, reference

__all__ = ["nearest"]


def nearest(x_CD: Tensor, rows: Tensor, hosts: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """The largest cosine of each row with a host, and which host that is.

    Parameters
    ----------
    x_CD : Tensor
        ``[C, D]`` float32, float16 or bfloat16.
    rows : Tensor
        ``[R]`` int64 on the CPU: which rows of ``x_CD`` ask.
    hosts : Tensor
        ``[M]`` int64 on the CPU, at least one: which rows of it answer.
    backend : Backend
        A GPU has no kernel of its own: it runs the reference.

    Returns
    -------
    cosine : Tensor
        ``[R]`` float32 on the CPU.
    host : Tensor
        ``[R]`` int64 on the CPU, an index into ``hosts``: the first of equally similar ones.

    Raises
    ------
    ValueError
        If there is no host, or shapes or dtypes do not fit.
    """
    C = x_CD.shape[0]
    for name, index in (("rows", rows), ("hosts", hosts)):
        if index.dim() != 1 or index.device.type != "cpu" or index.is_floating_point():
            raise ValueError(
                f"nearest takes {name} as integers [n] on the CPU, got {index.dtype}; convert them"
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < C:
            raise ValueError(f"nearest: {name} lie outside the {C} rows of the matrix; give 0 to {C - 1}")
    if hosts.numel() == 0:
        raise ValueError("nearest: there is no host to compare with; give at least one")
    if backend == "auto" and x_CD.device.type != "cpu":
        backend = "reference"
    chosen = choose("nearest", backend, x_CD.device, unsupported=native.unsupported(x_CD))
    if chosen == "triton":
        raise ValueError("nearest has no Triton kernel; use backend='auto'")
    run = native.nearest if chosen == "native" else reference.nearest
    return run(x_CD, rows.long(), hosts.long())
