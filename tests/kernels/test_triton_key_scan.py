"""The Triton key scan, interpreted, against the reference: integers, so exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_process import interpreted, needs_triton
from winnow.kernels.key_scan import KeyCodes, key_scan, quantize_keys

pytestmark = needs_triton
F32, F16 = torch.float32, torch.float16


def filled(k: Tensor, begin: Tensor, end: Tensor, into: KeyCodes, backend: str) -> KeyCodes:
    """`into` after quantising; as a function, so that the result crosses the processes."""
    quantize_keys(k, begin, end, into, backend=backend)
    return into


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def codes(dim: int, bits: int, dtype: torch.dtype, capacity: int = 70) -> tuple[Tensor, KeyCodes]:
    k = torch.randn(2, capacity, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    k[0, 3] = 0.0
    k[:, -1] = torch.nan  # the reserve
    keys = KeyCodes.empty(2, capacity, dim, bits)
    keys.codes.fill_(77)
    keys.scales.fill_(-3.0)
    return k, keys


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [16, 48, 128])
def test_codes_and_scan(dim: int, bits: int, dtype: torch.dtype) -> None:
    k, got = codes(dim, bits, dtype)
    _, want = codes(dim, bits, dtype)
    q = torch.randn(6, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    q[2] = 0.0
    # A prefill, then steps that begin in the middle of a block; the rest stays as it was.
    for begin, end in ((int32(0, 0), int32(50, 33)), (int32(50, 33), int32(61, 33))):
        target = "tests.kernels.test_triton_key_scan:filled"
        got = interpreted(target, k, begin, end, got, "triton")
        filled(k, begin, end, want, "reference")
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scales, want.scales)
    for reduce in ("none", "max", "sum"):
        call = {"reduce": reduce, "width": 66}
        scores = interpreted(
            "winnow.kernels.key_scan:key_scan", q, got, int32(61, 33), backend="triton", **call
        )
        expected = key_scan(q, want, int32(61, 33), backend="reference", **call)
        if reduce == "sum":  # float32 sums over the group in another order
            torch.testing.assert_close(scores, expected)
        else:
            assert torch.equal(scores, expected)


def test_an_empty_head() -> None:
    k, keys = codes(16, 8, F32)
    filled(k, int32(0, 0), int32(40, 0), keys, "reference")
    q = torch.randn(2, 16)
    scores = interpreted("winnow.kernels.key_scan:key_scan", q, keys, int32(40, 0), backend="triton")
    assert torch.equal(scores, key_scan(q, keys, int32(40, 0), backend="reference"))


def test_ranges_outside_the_reserve_are_refused() -> None:
    k, keys = codes(16, 8, F32)
    with pytest.raises(ValueError, match="grow it first"):
        interpreted("tests.kernels.test_triton_key_scan:filled", k, int32(0, 0), int32(9, 99), keys, "triton")
    with pytest.raises(ValueError, match="outside the reserve"):
        interpreted("winnow.kernels.key_scan:key_scan", k[0, :2], keys, int32(99, 1), backend="triton")
