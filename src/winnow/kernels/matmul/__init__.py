"""Rows times a large weight matrix: many are bound by arithmetic, few by reading the weights."""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose

from . import native, reference

__all__ = ["gated_matmul", "matmul"]


def matmul(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """``x @ w.T + bias``, as ``torch.nn.functional.linear`` has it.

    Parameters
    ----------
    x_RK : Tensor
        ``[R, K]`` of any floating dtype.
    w_NK : Tensor
        ``[N, K]`` of the same dtype.
    bias_N : Tensor or None
        ``[N]`` of the same dtype.
    backend : Backend
        ``auto`` takes the native kernel for few rows, and for any on processors with AVX-512 or AVX2
        and without tiles for products (AMX), which PyTorch uses better. A GPU has no kernel of its own:
        it runs the reference.

    Returns
    -------
    Tensor
        ``[R, N]`` in the dtype of ``x``; natively summed in float32 and rounded once. With AVX-512, up to
        48 rows are summed up alike: a row gives the same bits whatever batch it comes in.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or the demanded backend cannot run.
    """
    run = native.matmul if _natively("matmul", x_RK, w_NK, bias_N, backend) else reference.matmul
    return run(x_RK, w_NK, bias_N)


def gated_matmul(
    x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """``silu(gate) * up`` of the products with gate and up weights.

    Parameters
    ----------
    x_RK : Tensor
        ``[R, K]``.
    w_NK : Tensor
        ``[N, K]``: first the ``N / 2`` rows of gate, then those of up.
    bias_N : Tensor or None
        ``[N]``.
    backend : Backend
        As for :func:`matmul`.

    Returns
    -------
    Tensor
        ``[R, N / 2]`` in the dtype of ``x``. Natively gate and up stay in float32, and the result is
        rounded once; the reference rounds them first.

    Raises
    ------
    ValueError
        If ``N`` is odd, shapes or dtypes do not fit, or the demanded backend cannot run.
    """
    if w_NK.shape[0] % 2:
        raise ValueError(
            f"gated_matmul takes as many gate as up rows, got {w_NK.shape[0]} together; join both"
        )
    run = (
        native.gated_matmul
        if _natively("gated_matmul", x_RK, w_NK, bias_N, backend)
        else reference.gated_matmul
    )
    return run(x_RK, w_NK, bias_N)


def _natively(op: str, x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None, backend: Backend) -> bool:
    """Whether the native kernel takes these operands, else PyTorch."""
    if x_RK.dim() != 2 or w_NK.dim() != 2 or x_RK.shape[1] != w_NK.shape[1]:
        raise ValueError(
            f"{op} takes x [R, K] and w [N, K], got {list(x_RK.shape)} and {list(w_NK.shape)}; "
            "reshape them to two dimensions with the same K"
        )
    if bias_N is not None and bias_N.shape != w_NK.shape[:1]:
        raise ValueError(f"{op}: a bias {list(bias_N.shape)} does not fit {w_NK.shape[0]} outputs; give [N]")
    if w_NK.dtype != x_RK.dtype or (bias_N is not None and bias_N.dtype != x_RK.dtype):
        raise ValueError(f"{op}: x is {x_RK.dtype}, weights or bias are not; convert them")
    if backend == "auto" and (x_RK.device.type != "cpu" or not native.is_faster(len(x_RK))):
        backend = "reference"
    chosen = choose(op, backend, x_RK.device, unsupported=native.unsupported(x_RK, w_NK, bias_N))
    if chosen == "triton":
        raise ValueError(f"{op} has no Triton kernel; use backend='auto'")
    return chosen == "native"
