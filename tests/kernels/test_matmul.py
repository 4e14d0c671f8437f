"""Matrix products: every instruction set against products in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from winnow.kernels.matmul import gated_matmul, matmul, native

from .many_queries import ISAS, forced
from .tolerances import MATMUL

DTYPES = [torch.float32, torch.bfloat16]


def operands(
    rows: int, outer: int, inner: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights and bias such that products have unit scale."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, inner, generator=generator) / inner**0.25 for n in (rows, outer))
    return x.to(dtype), w.to(dtype), torch.randn(outer, generator=generator).to(dtype)


def check(x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    rtol, atol = MATMUL[x.dtype]
    wide = functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    got = matmul(x, w, bias, backend="native")
    assert got.dtype == x.dtype
    torch.testing.assert_close(got.double(), wide, rtol=rtol, atol=atol)
    if len(w) % 2 == 0:
        gate, up = wide.chunk(2, 1)
        got = gated_matmul(x, w, bias, backend="native")
        assert got.dtype == x.dtype
        torch.testing.assert_close(got.double(), functional.silu(gate) * up, rtol=rtol, atol=atol)


@settings(deadline=None, max_examples=80)
@given(
    isa=st.sampled_from(ISAS) if ISAS else st.nothing(),
    rows=st.integers(1, 40),
    outer=st.integers(1, 200),
    inner=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(
    isa: str, rows: int, outer: int, inner: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    x, w, bias = operands(rows, outer, inner, dtype, seed)
    with forced(isa):
        check(x, w, bias if biased else None)


@pytest.mark.parametrize("inner", [1024, 2048, 2050, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_slab(isa: str, dtype: torch.dtype, inner: int) -> None:
    check(*operands(25, 130, inner, dtype))


def test_more_rows_than_are_packed_at_a_time(isa: str) -> None:
    # 16 MiB of packed words hold 12 rows of so many.
    x, w, bias = operands(31, 20, 700_001, torch.bfloat16)
    check(x, w, bias)


def test_threads_share_the_rows_of_few_outputs(isa: str) -> None:
    check(*operands(4001, 10, 64, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_views_and_not_beyond_them(isa: str, dtype: torch.dtype) -> None:
    x, w = (torch.full((n, 128), torch.nan, dtype=dtype) for n in (30, 90))
    own_x, own_w, bias = operands(20, 70, 77, dtype)
    x[3:23, :77], w[9:79, :77] = own_x, own_w
    check(x[3:23, :77], w[9:79, :77], bias)


# 48 rows are few and 49 are many; the others make one to three groups of few rows, full and not.
@pytest.mark.parametrize("rows", [1, 4, 8, 9, 24, 25, 33, 41, 48, 49])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(isa: str, dtype: torch.dtype, rows: int) -> None:
    check(*operands(rows, 150, 333, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gives_the_same_bits_in_any_company(isa: str, dtype: torch.dtype) -> None:
    """Among many rows everywhere; among few, as a batch that decodes has, where there is AVX-512."""
    x, w, bias = operands(200, 96, 300, dtype)
    companies = {200: (49, 64, 100)} | ({48: (1, 2, 5, 16, 30, 41)} if isa == "avx512" else {64: (9, 17)})
    for product in (matmul, gated_matmul):
        for company, some in companies.items():
            whole = product(x[:company], w, bias, backend="native")
            for rows in some:
                assert torch.equal(product(x[3 : 3 + rows], w, bias, backend="native"), whole[3 : 3 + rows])


def test_poison_stays_in_its_row(isa: str) -> None:
    x, w, _ = operands(20, 66, 40, torch.float32)
    x[7, 3] = torch.nan
    for product in (matmul, gated_matmul):
        got = product(x, w, backend="native")
        assert bool(got[7].isnan().all())
        assert not bool(got[[i for i in range(20) if i != 7]].isnan().any())


def test_large_gates_neither_overflow_nor_vanish(isa: str) -> None:
    x, w = torch.tensor([[1.0], [-1.0], [100.0], [-100.0]]), torch.tensor([[1.0], [3.0]])
    gate, up = x.double(), 3 * x.double()
    got = gated_matmul(x, w, backend="native").double()
    torch.testing.assert_close(got, functional.silu(gate) * up, rtol=1e-5, atol=1e-5)


def test_nothing_to_do() -> None:
    w = torch.ones(6, 3)
    assert matmul(torch.ones(0, 3), w, backend="native").shape == (0, 6)
    assert matmul(torch.ones(2, 3), w[:0], backend="native").shape == (2, 0)
    assert gated_matmul(torch.ones(2, 0), w[:, :0], backend="auto").shape == (2, 3)


def test_auto_takes_the_kernel_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(native, "matmul", lambda *_: asked.append("native"))
    x, w, _ = operands(20, 30, 40, torch.bfloat16)
    for faster in (True, False):
        monkeypatch.setattr(native, "is_faster", lambda _, faster=faster: faster)
        asked.append(str(faster))
        matmul(x, w)
    assert asked == ["True", "native", "False"]


@pytest.mark.parametrize(
    ("x", "w", "bias", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), None, "same K"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), "does not fit 4 outputs"),
        (torch.ones(2, 3), torch.ones(4, 3).bfloat16(), None, "convert them"),
    ],
)
def test_operands_that_do_not_fit(x: Tensor, w: Tensor, bias: Tensor | None, message: str) -> None:
    for product in (matmul, gated_matmul):
        with pytest.raises(ValueError, match=message):
            product(x, w, bias)


def test_what_it_cannot_do() -> None:
    x, w = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="as many gate as up"):
        gated_matmul(x, w)
    with pytest.raises(ValueError, match="backend='auto'"):
        matmul(x, w, backend="triton")
    with pytest.raises(ValueError, match="not float32 or bfloat16"):
        matmul(x.half(), w.half(), backend="native")
    with pytest.raises(ValueError, match="last dimension"):
        matmul(torch.ones(4, 2).T, w, backend="native")
