"""What lies between the matrix products of a Llama-shaped layer: norm, rotation, gated activation."""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.backend import Backend, choose

from . import native, reference

__all__ = ["add_rms_norm", "rotate_heads", "silu_mul"]


def add_rms_norm(
    x_RK: Tensor, delta_RK: Tensor | None, weight_K: Tensor, *, eps: float, backend: Backend = "auto"
) -> Tensor:
    """Add to the residual stream and normalise it.

    Parameters
    ----------
    x_RK : Tensor
        ``[R, K]`` contiguous; ``delta_RK`` is added to it in place, rounded to its dtype.
    delta_RK : Tensor or None
        ``[R, K]`` contiguous, of the same dtype.
    weight_K : Tensor
        ``[K]``.
    eps : float
        Added to the mean square.
    backend : Backend

    Returns
    -------
    Tensor
        ``[R, K]``: ``x / sqrt(mean(x^2) + eps) * weight``, rounded once.

    Raises
    ------
    ValueError
        If shapes do not fit or the demanded backend cannot run.
    """
    if weight_K.shape != x_RK.shape[1:] or not (delta_RK is None or delta_RK.shape == x_RK.shape):
        raise ValueError(
            f"x {list(x_RK.shape)} and its norm's weight or delta differ in shape; give [R, K] and [K]"
        )
    operands = (x_RK, weight_K) if delta_RK is None else (x_RK, weight_K, delta_RK)
    if _choose("norm", backend, operands) == "native":
        return native.add_rms_norm(x_RK, delta_RK, weight_K, eps)
    return reference.add_rms_norm(x_RK, delta_RK, weight_K, eps)


def rotate_heads(
    heads_RHD: Tensor,
    cos_RE: Tensor,
    sin_RE: Tensor,
    *,
    query_heads: int,
    key_heads: int,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 0.0,
    backend: Backend = "auto",
) -> None:
    """Turn query and key heads by their positions, in place; normalise each head first where asked.

    Parameters
    ----------
    heads_RHD : Tensor
        ``[R, A, D]`` contiguous: query heads, then key heads, then others that stay untouched.
    cos_RE, sin_RE : Tensor
        ``[R, D / 2]`` float32; dimension ``e`` turns with ``e + D / 2``.
    query_heads, key_heads : int
    q_weight_D, k_weight_D : Tensor or None
        ``[D]`` weights of an RMS norm over each head, before the rotation.
    eps : float
        Of that norm.
    backend : Backend

    Raises
    ------
    ValueError
        If shapes do not fit or the demanded backend cannot run.
    """
    rows, all_heads, depth = heads_RHD.shape
    if (
        query_heads + key_heads > all_heads
        or cos_RE.shape != (rows, depth // 2)
        or sin_RE.shape != cos_RE.shape
    ):
        raise ValueError(
            f"{query_heads} + {key_heads} heads of {list(heads_RHD.shape)} and angles {list(cos_RE.shape)} "
            "do not fit; give [R, A, D] and [R, D / 2]"
        )
    weights = tuple(w for w in (q_weight_D, k_weight_D) if w is not None)
    run = native if _choose("rotate", backend, (heads_RHD, *weights)) == "native" else reference
    run.rotate_heads(heads_RHD, cos_RE, sin_RE, query_heads, key_heads, q_weight_D, k_weight_D, eps)


def silu_mul(gate_up_RI: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``silu(gate) * up`` of rows that hold gate and then up: ``[R, 2 * I]`` to ``[R, I]``."""
    if _choose("silu", backend, (gate_up_RI,)) == "native":
        return native.silu_mul(gate_up_RI)
    return reference.silu_mul(gate_up_RI)


def _choose(op: str, backend: Backend, operands: tuple[Tensor, ...]) -> Backend:
    """There is no Triton form: on a GPU the reference is a few fused PyTorch calls."""
    device = operands[0].device
    if backend == "auto" and device.type != "cpu":
        return "reference"
    chosen = choose(op, backend, device, unsupported=native.unsupported(operands))
    if chosen == "triton":
        raise ValueError(f"{op} has no Triton kernel; use backend='auto' or 'reference'")
    return chosen
