"""Matrix-vector product on a GPU: every weight is read once, by programs that own some output columns.

One row of ``x`` goes without the matrix units: the weights stream through registers. Several rows
share each tile of weights in a matrix product of 16 rows. With 8-bit weights the rows of ``x`` are
rounded first and the products are exact integers.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.triton_support import DTYPES, config, next_power_of_2, rounded, tl, triton, tuned

from .weights import Int8Weight

__all__ = ["matvec"]


@triton.jit
def _round_rows(x, codes, scales, x_row, K, BLOCK_K: tl.constexpr):
    """One program per row: int8 codes and the float32 scale, as ``reference.quantize_rows``."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    top = tl.zeros([BLOCK_K], tl.float32)
    broken = tl.zeros([BLOCK_K], tl.int32)
    for k in tl.range(0, K, BLOCK_K):
        value = tl.load(x + row * x_row + k + lane, mask=k + lane < K, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(value))
        broken |= (value - value != 0.0).to(tl.int32)  # NaN and infinity
    broken = tl.max(broken, 0) > 0
    top = tl.max(top, 0)
    safe = tl.where(broken | (top == 0.0), 1.0, top)
    # Rounded to float32 before it multiplies, as the other implementations do it.
    factor = tl.where(broken | (top == 0.0), 0.0, tl.div_rn(127.0, safe))
    for k in tl.range(0, K, BLOCK_K):
        value = tl.load(x + row * x_row + k + lane, mask=k + lane < K, other=0.0).to(tl.float32)
        value = tl.where(broken, 0.0, value)
        tl.store(codes + row * K + k + lane, rounded(value * factor).to(tl.int8), mask=k + lane < K)
    tl.store(scales + row, tl.where(broken, float("nan"), tl.div_rn(tl.where(broken, 0.0, top), 127.0)))


def _fits(c: Any, call: Mapping[str, Any]) -> bool:
    """Float32 products run outside the matrix units, on registers: small tiles only."""
    n, k = c.kwargs["BLOCK_N"], c.kwargs["BLOCK_K"]
    if call["ONE_ROW"]:
        return bool(n * k <= 8192)
    return bool(k <= 128 and n >= 16 and (not call["WIDE"] or n * k <= 1024))


@tuned(
    [
        config(4, 2, BLOCK_N=16, BLOCK_K=512),
        config(8, 2, BLOCK_N=16, BLOCK_K=512),
        config(4, 2, BLOCK_N=8, BLOCK_K=1024),
        config(4, 2, BLOCK_N=4, BLOCK_K=1024),
        config(4, 4, BLOCK_N=32, BLOCK_K=128),
        config(4, 5, BLOCK_N=16, BLOCK_K=128),
        config(4, 4, BLOCK_N=64, BLOCK_K=128),
        config(4, 2, BLOCK_N=16, BLOCK_K=64),
    ],
    key=["N", "K", "ONE_ROW", "INTEGER"],
    small={"BLOCK_N": 16, "BLOCK_K": 64},
    keep=_fits,
)
@triton.jit(do_not_specialize=["R"])
def _matvec(
    x, w, out, x_scale, w_scale, R, N, K, x_row, w_row,
    ONE_ROW: tl.constexpr, INTEGER: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of outputs, tiles of rows). ``WIDE`` multiplies in float32."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_ok = n < N
    w_at = w + n.to(tl.int64) * w_row
    if ONE_ROW:
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.int32 if INTEGER else tl.float32)
        for begin in tl.range(0, K, BLOCK_K):
            k_ok = begin + k < K
            tile_w = tl.load(w_at[:, None] + begin + k[None, :], mask=n_ok[:, None] & k_ok[None, :], other=0)
            tile_x = tl.load(x + begin + k, mask=k_ok, other=0)
            acc += tile_w.to(acc.dtype) * tile_x.to(acc.dtype)[None, :]
        result = tl.sum(acc, 1)
        if INTEGER:
            result = result.to(tl.float32) * (tl.load(x_scale) * tl.load(w_scale + n, mask=n_ok, other=0.0))
        tl.store(out + n, result.to(out.dtype.element_ty), mask=n_ok)
    else:
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        r_ok = r < R
        x_at = x + r.to(tl.int64) * x_row
        acc = tl.zeros([BLOCK_R, BLOCK_N], tl.int32 if INTEGER else tl.float32)
        for begin in tl.range(0, K, BLOCK_K):
            k_ok = begin + k < K
            tile_w = tl.load(w_at[None, :] + begin + k[:, None], mask=n_ok[None, :] & k_ok[:, None], other=0)
            tile_x = tl.load(x_at[:, None] + begin + k[None, :], mask=r_ok[:, None] & k_ok[None, :], other=0)
            if WIDE:
                acc = tl.dot(tile_x.to(tl.float32), tile_w.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(tile_x, tile_w, acc, out_dtype=acc.dtype)
        result = acc
        if INTEGER:
            scale_r = tl.load(x_scale + r, mask=r_ok, other=0.0)
            scale_n = tl.load(w_scale + n, mask=n_ok, other=0.0)
            result = acc.to(tl.float32) * (scale_r[:, None] * scale_n[None, :])
        tl.store(
            out + r.to(tl.int64)[:, None] * N + n[None, :],
            result.to(out.dtype.element_ty),
            mask=r_ok[:, None] & n_ok[None, :],
        )


def matvec(x_RK: Tensor, w_NK: Tensor | Int8Weight) -> Tensor:
    """As :func:`winnow.kernels.matvec.matvec`, on the device of ``x``."""
    integer = isinstance(w_NK, Int8Weight)
    wide = w_NK.codes if isinstance(w_NK, Int8Weight) else w_NK
    R, K = x_RK.shape
    N = wide.shape[0]
    if x_RK.dtype not in DTYPES or not (integer or wide.dtype in DTYPES):
        raise ValueError(
            f"matvec: no Triton kernel for {x_RK.dtype} and {wide.dtype}; use backend='reference'"
        )
    if x_RK.device != wide.device:
        raise ValueError(f"matvec: x lies on {x_RK.device}, weights on {wide.device}; move one of them")
    out_RN = torch.empty(R, N, dtype=x_RK.dtype, device=x_RK.device)
    if R == 0 or N == 0:
        return out_RN
    x, x_scale, w_scale = (x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()), out_RN, out_RN
    if isinstance(w_NK, Int8Weight):
        codes_RK = torch.empty(R, K, dtype=torch.int8, device=x.device)
        x_scale = torch.empty(R, dtype=torch.float32, device=x.device)
        # A fused multiply-add would skip the rounding of the product and move ties.
        _round_rows[(R,)](
            x, codes_RK, x_scale, x.stride(0), K,
            BLOCK_K=min(next_power_of_2(max(K, 16)), 4096), num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        x, w_scale = codes_RK, w_NK.scale
    rows = 16
    in_float32 = not integer and (x.dtype != wide.dtype or x.dtype == torch.float32)
    _matvec[lambda meta: (triton.cdiv(N, meta["BLOCK_N"]), 1 if R == 1 else triton.cdiv(R, rows))](
        x, wide, out_RN, x_scale, w_scale, R, N, K, x.stride(0), wide.stride(0),
        ONE_ROW=R == 1, INTEGER=integer, WIDE=in_float32, BLOCK_R=rows,
    )  # fmt: skip
    return out_RN
