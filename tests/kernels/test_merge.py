"""Merging partial results: the native kernel, the reference and attention over everything at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.kernels import backend
from winnow.kernels.decode import decode
from winnow.kernels.merge import merge
from winnow.types import AttentionSpec, Partial, Segment

ISAS = backend.isas()
NATIVE = pytest.mark.skipif(not ISAS, reason="the extension was not built")


def partials(count: int, rows: int, heads: int, width: int, seed: int = 0) -> list[Partial]:
    """Results in both types, rows that saw nothing among them."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        lse = torch.randn(rows, heads, generator=g) * 30
        nothing = torch.rand(rows, heads, generator=g) < 0.3
        out = torch.randn(rows, heads, width, generator=g).masked_fill(nothing.unsqueeze(2), 0)
        made.append(
            Partial(
                out=out.bfloat16() if i % 2 else out, lse=lse.masked_fill(nothing, -torch.inf), pairs=i + 1
            )
        )
    return made


@NATIVE
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_native_equals_the_reference(count: int, rows: int, heads: int, width: int, seed: int) -> None:
    parts = partials(count, rows, heads, width, seed)
    for name in ISAS:
        backend.force_isa(name)
        ours, oracle = (merge(parts, backend=of) for of in ("native", "reference"))
        assert ours.out.dtype == oracle.out.dtype == torch.float32
        torch.testing.assert_close(ours.out, oracle.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.lse, oracle.lse, rtol=1e-6, atol=1e-5)
        assert ours.pairs == oracle.pairs
    backend.force_isa(ISAS[0])


def test_many_rows_go_over_the_threads(isa: str) -> None:
    parts = partials(3, 200, 8, 64)
    ours, oracle = (merge(parts, backend=of) for of in ("native", "reference"))
    torch.testing.assert_close(ours.out, oracle.out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", ["reference", pytest.param("native", marks=NATIVE)])
def test_parts_merge_to_the_whole(of: backend.Backend) -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(8, 64, generator=g), *torch.randn(2, 2, 300, 64, generator=g)
    spec = AttentionSpec(scale=0.125)

    def attended(first: int, last: int) -> Partial:
        lengths = torch.tensor([last - first] * 2, dtype=torch.int32)
        one = Segment(k=k[:, first:last], v=v[:, first:last], lengths=lengths, start=first)
        return decode(q, one, spec=spec, position=250)

    whole = attended(0, 300)
    merged = merge([attended(0, 10), attended(10, 200), attended(200, 290), attended(290, 300)], backend=of)
    torch.testing.assert_close(merged.out, whole.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-6, atol=1e-5)
    assert merged.pairs == whole.pairs


def test_what_cannot_be_merged_is_said() -> None:
    one, other = partials(2, 1, 4, 16)
    with pytest.raises(ValueError, match="no Triton kernel"):
        merge([one, other], backend="triton")
    if ISAS:
        half = Partial(out=one.out.half(), lse=one.lse, pairs=0)
        with pytest.raises(ValueError, match="float16"):
            merge([half, other], backend="native")
        assert merge([half, other]).out.dtype == torch.float32
        short = Partial(out=one.out[..., :8].contiguous(), lse=one.lse, pairs=0)
        with pytest.raises(ValueError, match="differ in shape"):
            merge([short, other], backend="native")
