"""The Triton prefill kernel, interpreted, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.tolerances import LOG_SUM_EXP, OUTPUT
from tests.kernels.triton_process import interpreted, needs_triton
from winnow.kernels.prefill import prefill
from winnow.types import AttentionSpec, Blocks, Dense, Form, Partial, Segment, Stripes, Window

pytestmark = needs_triton
F32, F16 = torch.float32, torch.float16
PLAIN = AttentionSpec(scale=0.2)


def segment(
    lengths: list[int],
    D: int,
    dtype: torch.dtype = F32,
    *,
    start: int = 0,
    gaps: bool = False,
    bias: bool = False,
    interleaved: bool = False,
) -> Segment:
    """A ragged segment whose reserve is poisoned."""
    g = torch.Generator().manual_seed(len(lengths) + D)
    H, C = len(lengths), max(lengths) + 5
    k, v = (torch.randn(H, C, D, generator=g).to(dtype) for _ in range(2))
    if interleaved:  # the heads of one entry lie side by side
        k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    positions = None
    if gaps:
        steps = torch.randint(1, 4, (H, C), generator=g)
        positions = (steps.cumsum(1) - 1 + start).to(torch.int32)
    values = torch.randn(H, C, generator=g) if bias else None
    for h, n in enumerate(lengths):
        k[h, n:], v[h, n:] = torch.nan, torch.nan
        if positions is not None:
            positions[h, n:] = -7
        if values is not None:
            values[h, n:] = torch.nan
    return Segment(
        k=k,
        v=v,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        start=start,
        positions=positions,
        bias=values,
    )


def queries(T: int, heads: int, D: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(T, heads, D, generator=torch.Generator().manual_seed(T)).to(dtype)


def positions(first: int, T: int) -> Tensor:
    return torch.arange(first, first + T, dtype=torch.int32)


def lists(heads: int, count: int, limit: int) -> tuple[Tensor, Tensor]:
    """Offsets and columns of random ascending lists; the first one is empty."""
    picked = torch.rand(heads, count, limit, generator=torch.Generator().manual_seed(limit)) < 0.5
    picked[0, 0] = False
    ends = picked.sum(-1).flatten().cumsum(0).view(heads, count)
    before = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1, -1]])
    return torch.cat([before[:, None], ends], 1).to(torch.int32), picked.nonzero()[:, 2].to(torch.int32)


def check(q: Tensor, s: Segment, spec: AttentionSpec, q_pos: Tensor, form: Form) -> Partial:
    call = {"spec": spec, "query_positions": q_pos, "form": form, "want_row_max": True}
    got = interpreted("winnow.kernels.prefill:prefill", q, s, backend="triton", **call)
    want = prefill(q, s, backend="reference", **call)
    rtol, atol = OUTPUT[q.dtype]
    assert got.out.dtype == q.dtype
    torch.testing.assert_close(got.out, want.out, rtol=rtol, atol=atol)
    rtol, atol = LOG_SUM_EXP[q.dtype]
    torch.testing.assert_close(got.lse, want.lse, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.row_max, want.row_max, rtol=rtol, atol=atol)
    assert got.pairs == want.pairs
    return got


FORMS: dict[str, Form] = {
    "dense": Dense(),
    "window": Window(init=5, local=20),
    "window-aligned": Window(init=3, local=32, align=16),
    "window-without-init": Window(init=0, local=9),
    "window-wider-than-all": Window(init=70, local=200),
}


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms_without_lists(form: Form, dtype: torch.dtype) -> None:
    s = segment([101, 77], 16, dtype)
    check(queries(45, 4, 16, dtype), s, PLAIN, positions(56, 45), form)


@pytest.mark.parametrize("name", ["dense", "window", "window-aligned"])
def test_every_option_together(name: str) -> None:
    s = segment([99, 0, 60], 24, gaps=True, bias=True, start=3, interleaved=True)
    spec = AttentionSpec(scale=0.3, window=60, softcap=2.0)
    check(queries(37, 3, 24), s, spec, positions(90, 37), FORMS[name])


@pytest.mark.parametrize(("block", "dtype"), [(32, F32), (32, F16), (64, F32), (20, F32)])
def test_blocks(block: int, dtype: torch.dtype) -> None:
    T, S = 75, 120
    offsets, columns = lists(4, -(-T // block), -(-S // block))
    form = Blocks(block=block, offsets=offsets, columns=columns)
    check(queries(T, 4, 16, dtype), segment([S, S - 3], 16, dtype), PLAIN, positions(S - T, T), form)


def test_blocks_with_gaps_bias_and_a_sliding_window() -> None:
    T, S = 50, 90
    offsets, columns = lists(4, 2, 3)
    s = segment([S, S], 16, gaps=True, bias=True)
    check(
        queries(T, 4, 16),
        s,
        replace(PLAIN, window=50),
        positions(140, T),
        Blocks(block=32, offsets=offsets, columns=columns),
    )


@pytest.mark.parametrize(
    ("rows", "phase", "dtype"), [(48, 0, F32), (48, 20, F16), (200, 130, F32), (17, 3, F32)]
)
def test_stripes(rows: int, phase: int, dtype: torch.dtype) -> None:
    T, S = 70, 110
    offsets, columns = lists(2, -(-(T + phase) // rows), S)
    form = Stripes(rows=rows, phase=phase, offsets=offsets, columns=columns)
    check(queries(T, 2, 16, dtype), segment([S], 16, dtype), PLAIN, positions(S - T, T), form)


def test_stripes_with_gaps_bias_and_a_sliding_window() -> None:
    offsets, columns = lists(2, 2, 80)
    s = segment([80], 16, gaps=True, bias=True)
    check(
        queries(60, 2, 16),
        s,
        replace(PLAIN, window=50),
        positions(110, 60),
        Stripes(rows=40, phase=0, offsets=offsets, columns=columns),
    )


@pytest.mark.parametrize("first", [30, 31, 32])
def test_the_diagonal_meets_the_edge_of_a_tile(first: int) -> None:
    """Tiles hold 32 entries: one entry decides whether a tile needs a mask."""
    T, S = 34, first + 34
    everything = torch.arange(S, dtype=torch.int32)
    offsets = torch.tensor([[0, S, 2 * S], [2 * S, 3 * S, 4 * S]], dtype=torch.int32)
    forms = (
        Dense(),
        Window(init=2, local=33),
        Blocks(
            block=32,
            offsets=torch.tensor([[0, 2, 4], [4, 6, 8]], dtype=torch.int32),
            columns=everything[:2].repeat(4),
        ),
        Stripes(rows=32, phase=0, offsets=offsets, columns=everything.repeat(4)),
    )
    for form in forms:
        check(queries(T, 2, 16), segment([S], 16), PLAIN, positions(first, T), form)
    windowed = replace(PLAIN, window=33)
    check(queries(T, 2, 16), segment([S], 16), windowed, positions(first, T), Dense())


def test_scattered_queries_see_no_later_entry() -> None:
    """Recomputed tokens are scattered over the prompt: the mask goes by position, not by row."""
    q_pos = torch.tensor([0, 1, 5, 6, 40, 41, 63, 64, 90, 99], dtype=torch.int32)
    for form in (Dense(), Window(init=4, local=8)):
        check(queries(10, 2, 16), segment([100, 100], 16), PLAIN, q_pos, form)


@pytest.mark.parametrize("D", [8, 40, 64])
def test_head_sizes(D: int) -> None:
    check(queries(20, 2, D), segment([40], D), AttentionSpec(scale=D**-0.5), positions(20, 20), Dense())


@pytest.mark.parametrize("T", [1, 63])
@pytest.mark.parametrize("S", [1, 63])
def test_lengths(T: int, S: int) -> None:
    check(queries(T, 2, 16), segment([S], 16), PLAIN, positions(max(S - T, 0), T), Dense())


def test_rows_that_see_nothing_are_zero() -> None:
    got = check(queries(20, 2, 16), segment([30], 16, start=10), PLAIN, positions(0, 20), Dense())
    assert torch.equal(got.out[:10], torch.zeros(10, 2, 16))
    assert torch.isneginf(got.lse[:10]).all()


def test_no_rows() -> None:
    got = check(queries(0, 2, 16), segment([30], 16), PLAIN, positions(0, 0), Dense())
    assert got.out.shape == (0, 2, 16)


def test_operands_stay_as_they_were() -> None:
    q, s = queries(20, 2, 16), segment([30], 16)
    call = {"spec": PLAIN, "query_positions": positions(10, 20), "backend": "triton"}
    after = interpreted("tests.kernels.test_triton_prefill:after_a_call", q, s, call)
    for mine, theirs in zip((q, s.k, s.v), after, strict=True):
        assert torch.equal(mine.nan_to_num(5.0), theirs.nan_to_num(5.0))


def after_a_call(q: Tensor, s: Segment, call: dict) -> tuple[Tensor, Tensor, Tensor]:
    prefill(q, s, **call)
    return q, s.k, s.v


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="convert one of them"):
        check(queries(20, 2, 16, F16), segment([30], 16), PLAIN, positions(10, 20), Dense())


def test_cpu_operands_outside_the_interpreter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a GPU.*backend='auto'"):
        prefill(
            queries(4, 2, 16), segment([4], 16), spec=PLAIN, query_positions=positions(0, 4), backend="triton"
        )
