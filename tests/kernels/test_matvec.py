"""Matrix-vector products: every instruction set against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.kernels import backend
from winnow.kernels.matvec import MAX_ROWS, Int8Weight, matvec, quantize_weight
from winnow.kernels.matvec.reference import quantize_rows

from .tolerances import MATVEC

DTYPES = [torch.float32, torch.bfloat16]
ISAS = backend.isas()


def unit(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Values such that a product over the last dimension has unit scale."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.25).to(dtype)


def check(x: torch.Tensor, w: torch.Tensor | Int8Weight) -> None:
    got, want = matvec(x, w, backend="native"), matvec(x, w, backend="reference")
    assert got.dtype == want.dtype == x.dtype
    rtol, atol = MATVEC[x.dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
@pytest.mark.parametrize("w_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_equals_the_reference(isa: str, x_dtype: torch.dtype, w_dtype: torch.dtype, rows: int) -> None:
    x = unit(rows, 257, seed=rows, dtype=x_dtype)
    w = unit(301, 257, seed=7, dtype=torch.float32)
    check(x, quantize_weight(w) if w_dtype == torch.int8 else w.to(w_dtype))


@settings(deadline=None, max_examples=60)
@given(
    isa=st.sampled_from(ISAS) if ISAS else st.nothing(),
    rows=st.integers(1, 9),
    outer=st.integers(1, 70),
    inner=st.integers(1, 200),
    x_dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from([*DTYPES, torch.int8]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    isa: str, rows: int, outer: int, inner: int, x_dtype: torch.dtype, w_dtype: torch.dtype, seed: int
) -> None:
    x, w = unit(rows, inner, seed=seed, dtype=x_dtype), unit(outer, inner, seed=seed + 1, dtype=torch.float32)
    backend.force_isa(isa)
    try:
        check(x, quantize_weight(w) if w_dtype == torch.int8 else w.to(w_dtype))
    finally:
        backend.force_isa(ISAS[0])


@pytest.mark.parametrize("w_dtype", DTYPES)
def test_reads_views_and_not_beyond_them(isa: str, w_dtype: torch.dtype) -> None:
    x = torch.full((3, 100), torch.nan)
    x[:, :77] = unit(3, 77, seed=1, dtype=torch.float32)
    w = torch.full((40, 128), torch.nan, dtype=w_dtype)
    w[5:38, :77] = unit(33, 77, seed=2, dtype=w_dtype)
    check(x[:, :77], w[5:38, :77])


def test_large_enough_for_several_threads(isa: str) -> None:
    check(unit(2, 512, seed=3, dtype=torch.bfloat16), unit(1031, 512, seed=4, dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("w_dtype", [*DTYPES, torch.int8])
def test_rows_too_long_for_the_first_level_cache(isa: str, w_dtype: torch.dtype, rows: int) -> None:
    """They are read in another order than short ones."""
    x = unit(rows, 8213, seed=rows, dtype=torch.bfloat16)
    w = unit(45, 8213, seed=7, dtype=torch.float32)
    check(x, quantize_weight(w) if w_dtype == torch.int8 else w.to(w_dtype))


@pytest.mark.parametrize("inner", [300, 8213])
@pytest.mark.parametrize("w_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_a_row_gives_the_same_bits_in_any_company(
    isa: str, x_dtype: torch.dtype, w_dtype: torch.dtype, inner: int
) -> None:
    x, wide = unit(8, inner, seed=1, dtype=x_dtype), unit(37, inner, seed=2, dtype=torch.float32)
    w = quantize_weight(wide) if w_dtype == torch.int8 else wide.to(w_dtype)
    together = matvec(x, w, backend="native")
    for rows in range(1, 8):
        assert torch.equal(matvec(x[:rows], w, backend="native"), together[:rows])


def test_every_instruction_set_gives_the_same_int8_result() -> None:
    x, w = (
        unit(3, 333, seed=5, dtype=torch.float32),
        quantize_weight(unit(64, 333, seed=6, dtype=torch.float32)),
    )
    want = matvec(x, w, backend="reference")
    for name in ISAS:
        backend.force_isa(name)
        try:
            got = matvec(x, w, backend="native")
        finally:
            backend.force_isa(ISAS[0])
        # Sums are exact integers; only the product of the two scales may round differently.
        torch.testing.assert_close(got, want, rtol=3e-7, atol=0)


def test_int8_stays_within_its_rounding() -> None:
    x, w = unit(2, 512, seed=8, dtype=torch.float32), unit(96, 512, seed=9, dtype=torch.float32)
    weight = quantize_weight(w)
    exact, got = x.double() @ w.double().T, matvec(x, weight, backend="auto").double()
    _, x_scale = quantize_rows(x)
    # |xw - x'w'| <= |x||w - w'| + |x - x'||w'|, each error at most half a step of its scale.
    bound = x.double().abs().sum(1)[:, None] * weight.scale / 2
    bound = bound + x_scale[:, None] / 2 * (weight.codes.double() * weight.scale[:, None]).abs().sum(1)
    assert bool(((got - exact).abs() <= bound * (1 + 1e-5)).all())
    assert float((got - exact).abs().max()) > 0


def test_rows_of_zeros_and_poison(isa: str) -> None:
    w = quantize_weight(torch.cat([torch.zeros(1, 64), unit(3, 64, seed=1, dtype=torch.float32)]))
    x = unit(3, 64, seed=2, dtype=torch.float32)
    x[1] = 0
    x[2, 5] = torch.inf
    got = matvec(x, w, backend="native")
    torch.testing.assert_close(got, matvec(x, w, backend="reference"), equal_nan=True)
    assert bool((got[1] == 0).all())
    assert bool((got[0, 0] == 0) & got[2].isnan().all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_cannot_be_quantised(bad: float) -> None:
    w = torch.ones(4, 8)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(w)


def test_refusals() -> None:
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="same K"):
        matvec(x, w[:, :7])
    with pytest.raises(ValueError, match="two dimensions"):
        matvec(x[0], w)
    with pytest.raises(ValueError, match="needs a GPU"):
        matvec(x, w, backend="triton")
    with pytest.raises(ValueError, match="not float32 or bfloat16"):
        matvec(x.half(), w.half(), backend="native")
    with pytest.raises(ValueError, match="not contiguous"):
        matvec(x.T.contiguous().T, w, backend="native")
    assert matvec(x.half(), w.half()).dtype == torch.float16  # the reference takes what native cannot


def test_one_pass_serves_the_stated_rows() -> None:
    assert MAX_ROWS == 8
