"""Triton quantisation, interpreted, against the reference: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_process import interpreted, needs_triton
from winnow.kernels.quantize import Axis, Quantized, dequantize, quantize

pytestmark = needs_triton
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def values(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g) * torch.rand(shape, generator=g) * 5
    x[..., 0, :] = 1.5  # groups without spread
    x[..., 1] = 0.0
    return x.to(dtype)


def check(x: Tensor, bits: int, axis: Axis, group: int, symmetric: bool) -> Quantized:
    call = {"bits": bits, "axis": axis, "group": group, "symmetric": symmetric}
    got = interpreted("winnow.kernels.quantize:quantize", x, backend="triton", **call)
    want = quantize(x, backend="reference", **call)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)
    assert (got.zero is None) == (want.zero is None)
    assert got.zero is None or torch.equal(got.zero, want.zero)
    for dtype in (F32, F16):
        back = interpreted("winnow.kernels.quantize:dequantize", got, dtype, backend="triton")
        assert torch.equal(back, dequantize(want, dtype, backend="reference"))
    return got


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("axis", "group"), [("token", 16), ("token", 48), ("channel", 8), ("channel", 20)])
def test_same_bits(axis: Axis, group: int, bits: int, symmetric: bool) -> None:
    check(values((2, 40, 48)), bits, axis, group, symmetric)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_dtypes_and_leading_dimensions(axis: Axis, dtype: torch.dtype) -> None:
    check(values((2, 2, 32, 16), dtype), 4, axis, 16, False)


def test_views() -> None:
    """Heads that lie side by side, and a range of tokens of a larger table."""
    x = values((30, 3, 32)).transpose(0, 1)
    q = check(x, 4, "token", 32, False)
    part = Quantized(
        codes=q.codes[:, 5:21], scale=q.scale[:, 5:21], zero=q.zero[:, 5:21], bits=4, axis="token", group=32
    )
    back = interpreted("winnow.kernels.quantize:dequantize", part, F32, backend="triton")
    assert torch.equal(back, dequantize(part, F32, backend="reference"))


def test_groups_that_end_inside_a_byte_are_refused() -> None:
    with pytest.raises(ValueError, match="larger groups"):
        check(values((4, 8)), 2, "token", 2, False)
