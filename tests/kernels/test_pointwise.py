"""Norm, rotation and gated activation: every instruction set equals the reference, on every shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels.pointwise import add_rms_norm, rotate_heads, silu_mul

# One rounding of the result: half a unit in the last place of bfloat16 is 2^-9; twice that where the
# reference sits on the other side of a tie.
TOLERANCE = {torch.float32: {"atol": 2e-6, "rtol": 2e-6}, torch.bfloat16: {"atol": 1e-6, "rtol": 2**-7}}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 2048), (3, 63), (70, 1000)])
@pytest.mark.parametrize("with_delta", [False, True])
def test_norm(rows: int, width: int, with_delta: bool, dtype: torch.dtype) -> None:
    weight = values(width, dtype=dtype, seed=1)
    delta = values(rows, width, dtype=dtype, seed=2) if with_delta else None
    streams = [values(rows, width, dtype=dtype) for _ in range(2)]
    got, want = (
        add_rms_norm(x, delta, weight, eps=1e-5, backend=backend)
        for x, backend in zip(streams, ("native", "reference"), strict=True)
    )
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    torch.testing.assert_close(*streams, atol=0, rtol=0)  # the residual stream rounds the same way


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("rows", "heads", "depth"), [(1, (32, 8), 64), (5, (3, 1), 6), (70, (2, 2), 128)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation(rows: int, heads: tuple[int, int], depth: int, normed: bool, dtype: torch.dtype) -> None:
    query_heads, key_heads = heads
    angles = values(rows, depth // 2, dtype=torch.float32, seed=1)
    weights = [values(depth, dtype=dtype, seed=2 + i) if normed else None for i in range(2)]
    both = [values(rows, query_heads + 2 * key_heads, depth, dtype=dtype) for _ in range(2)]
    for x, backend in zip(both, ("native", "reference"), strict=True):
        rotate_heads(
            x,
            angles.cos(),
            angles.sin(),
            query_heads=query_heads,
            key_heads=key_heads,
            q_weight_D=weights[0],
            k_weight_D=weights[1],
            eps=1e-6,
            backend=backend,
        )
    # A difference of two rounded terms may cancel: the error is relative to the terms.
    slack = 2e-6 if dtype == torch.float32 else 2**-7 * float(both[1].abs().max())
    torch.testing.assert_close(*both, atol=slack, rtol=0)
    untouched = values(rows, query_heads + 2 * key_heads, depth, dtype=dtype)
    assert torch.equal(both[0][:, query_heads + key_heads :], untouched[:, query_heads + key_heads :])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("rows", "width"), [(1, 8192), (3, 63), (70, 500)])
def test_gated_activation(rows: int, width: int, dtype: torch.dtype) -> None:
    x = values(rows, 2 * width, dtype=dtype) * 20  # both tails of the exponential
    torch.testing.assert_close(
        silu_mul(x, backend="native"), silu_mul(x, backend="reference"), **TOLERANCE[dtype]
    )


@pytest.mark.usefixtures("isa")
def test_extremes_and_nan(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e30, -200.0, 0.0, 200.0, torch.nan, torch.inf]], dtype=dtype)
    got = silu_mul(torch.cat((gate, torch.ones_like(gate)), 1), backend="native")[0]
    want = silu_mul(torch.cat((gate, torch.ones_like(gate)), 1), backend="reference")[0]
    torch.testing.assert_close(got.float(), want.float(), equal_nan=True, atol=1e-6, rtol=1e-2)


def test_bad_shapes_are_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="differ in shape"):
        add_rms_norm(x, None, torch.ones(4), eps=1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        rotate_heads(x.view(2, 2, 4), x, x, query_heads=1, key_heads=1)
    with pytest.raises(ValueError, match="Triton kernel"):
        silu_mul(x, backend="triton")
