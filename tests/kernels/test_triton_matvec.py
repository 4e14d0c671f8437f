"""The Triton matrix-vector product, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tolerances import MATVEC
from tests.kernels.triton_process import interpreted, needs_triton
from winnow.kernels.matvec import Int8Weight, matvec, quantize_weight

pytestmark = needs_triton
F32, F16 = torch.float32, torch.float16


def check(x: torch.Tensor, w: torch.Tensor | Int8Weight) -> None:
    got = interpreted("winnow.kernels.matvec:matvec", x, w, backend="triton")
    want = matvec(x, w, backend="reference")
    assert got.dtype == x.dtype
    if isinstance(w, Int8Weight):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())  # integers: exact
    else:
        rtol, atol = MATVEC[x.dtype]
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def operands(rows: int, N: int, K: int, dtype: torch.dtype = F32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows + N + K)
    # A weight matrix is often a slice of a fused one: rows need not lie side by side.
    w = torch.randn(N, K + 3, generator=g)[:, :K] * K**-0.5
    return torch.randn(rows, K, generator=g).to(dtype), w.to(dtype)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("rows", [1, 3, 18])
@pytest.mark.parametrize(("N", "K"), [(37, 130), (16, 64), (1, 1)])
def test_weights_as_they_are(N: int, K: int, rows: int, dtype: torch.dtype) -> None:
    check(*operands(rows, N, K, dtype))


@pytest.mark.parametrize("rows", [1, 3])
def test_mixed_dtypes(rows: int) -> None:
    x, w = operands(rows, 37, 130)
    check(x, w.half())


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("rows", [1, 3, 18])
def test_weights_in_8_bits(rows: int, dtype: torch.dtype) -> None:
    x, w = operands(rows, 37, 130, dtype)
    x[-1] = 0.0
    check(x, quantize_weight(w))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_breaks_only_itself(value: float) -> None:
    x, w = operands(3, 20, 70)
    x[1, 5] = value
    check(x, quantize_weight(w))


def test_ties_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    check(x, quantize_weight(torch.eye(8) * 127.0))
