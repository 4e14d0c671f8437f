"""The Triton decode kernel, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.test_triton_prefill import F16, F32, PLAIN, segment
from tests.kernels.tolerances import LOG_SUM_EXP, OUTPUT
from tests.kernels.triton_process import interpreted, needs_triton
from winnow.kernels.decode import decode
from winnow.types import AttentionSpec, Partial, Segment, Selection

pytestmark = needs_triton


def queries(heads: int, D: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(heads, D, generator=torch.Generator().manual_seed(heads)).to(dtype)


def select(rows: int, lengths: list[int], page: int, n: int) -> Selection:
    """Up to ``n`` random entries or pages per row, in no order; what lies behind a count is garbage."""
    g = torch.Generator().manual_seed(page)
    indices = torch.full((rows, n), 2**30, dtype=torch.int32)
    counts = torch.zeros(rows, dtype=torch.int32)
    for row in range(rows):
        most = -(-lengths[row * len(lengths) // rows] // page)
        listed = torch.randperm(most, generator=g)[: max(n - row, 0)]
        indices[row, : len(listed)] = listed.to(torch.int32)
        counts[row] = len(listed)
    return Selection(indices=indices, counts=counts, page=page)


def check(q: Tensor, s: Segment, spec: AttentionSpec, position: int, selection: Selection | None) -> Partial:
    call = {"spec": spec, "position": position, "selection": selection, "want_logits": True}
    got = interpreted("winnow.kernels.decode:decode", q, s, backend="triton", **call)
    want = decode(q, s, backend="reference", **call)
    rtol, atol = OUTPUT[q.dtype]
    assert got.out.dtype == q.dtype
    torch.testing.assert_close(got.out, want.out, rtol=rtol, atol=atol)
    rtol, atol = LOG_SUM_EXP[q.dtype]
    torch.testing.assert_close(got.lse, want.lse, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.logits, want.logits, rtol=rtol, atol=atol)
    assert got.pairs == want.pairs
    without = interpreted(
        "winnow.kernels.decode:decode", q, s, backend="triton", **call | {"want_logits": False}
    )
    assert without.logits is None
    assert torch.equal(without.out, got.out)
    return got


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("heads", [2, 8])
def test_everything(heads: int, dtype: torch.dtype) -> None:
    check(queries(heads, 16, dtype), segment([131, 77], 16, dtype), PLAIN, 130, None)


@pytest.mark.parametrize(
    "spec", [PLAIN, AttentionSpec(scale=0.3, window=40, softcap=2.0)], ids=["plain", "all"]
)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("position", [60, 500])
def test_a_query_sees_what_is_before_it(position: int, gaps: bool, spec: AttentionSpec) -> None:
    s = segment([100, 0, 31], 24, gaps=gaps, bias=gaps, start=5, interleaved=True)
    check(queries(3, 24), s, spec, position, None)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("page", [1, 16, 12])
@pytest.mark.parametrize("rows", [2, 6])
def test_selection(rows: int, page: int, dtype: torch.dtype) -> None:
    lengths = [100, 53]
    check(queries(6, 16, dtype), segment(lengths, 16, dtype), PLAIN, 99, select(rows, lengths, page, 6))


@pytest.mark.parametrize("page", [1, 16])
def test_selection_with_every_option(page: int) -> None:
    lengths = [90, 70]
    s = segment(lengths, 16, gaps=True, bias=True)
    spec = AttentionSpec(scale=0.3, window=60, softcap=2.0)
    check(queries(4, 16), s, spec, 110, select(2, lengths, page, 40 // page))


def test_selecting_every_page_equals_reading_everything() -> None:
    lengths = [100, 53]
    q, s = queries(4, 16), segment(lengths, 16)
    all_pages = Selection(
        indices=torch.arange(7, dtype=torch.int32).expand(2, 7),
        counts=torch.tensor([7, 4], dtype=torch.int32),
        page=16,
    )
    listed, dense = check(q, s, PLAIN, 99, all_pages), check(q, s, PLAIN, 99, None)
    assert listed.pairs == dense.pairs
    torch.testing.assert_close(listed.out, dense.out)


def test_nothing_to_see() -> None:
    got = check(queries(2, 16), segment([20, 0], 16, start=50), PLAIN, 10, None)
    assert torch.equal(got.out, torch.zeros(1, 2, 16))
    assert got.pairs == 0
