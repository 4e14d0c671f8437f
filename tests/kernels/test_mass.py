"""The native mass kernel against the reference, on every instruction set that this machine has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.many_queries import (
    BF16,
    F32,
    ISAS,
    halves,
    make,
    on_every_isa,
    one_thread,
    poisoned,
    strided,
)
from tests.kernels.tolerances import MASS
from winnow.kernels.mass import mass, native, reference
from winnow.kernels.prefill import prefill
from winnow.types import AttentionSpec, Segment

__all__ = ["poisoned"]  # a fixture
pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")


def compare(
    q: Tensor, segment: Segment, positions: Tensor, *, lse: Tensor | None = None, **spec: Any
) -> Tensor:
    """Native against the float32 reference of the same operands, on every instruction set.

    Returns the result of the best set. Without ``lse`` the segment is all that the queries see.
    """
    attention = AttentionSpec(**{"scale": q.shape[-1] ** -0.5, **spec})
    exact = replace(segment, k=segment.k.float(), v=segment.v.float())
    with one_thread():
        if lse is None:
            lse = prefill(
                q.float(), exact, spec=attention, query_positions=positions, backend="reference"
            ).lse
        want = reference.mass(q.float(), exact, attention, positions, lse)
    results = on_every_isa(
        lambda: mass(q, segment, spec=attention, query_positions=positions, lse=lse, backend="native"),
        q,
        segment.k,
        positions,
    )
    rtol, atol = MASS[q.dtype]
    for name, got in results:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=partial("on {}: {}".format, name))
    return results[0][1]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 128, 256])
def test_head_sizes(dtype: torch.dtype, D: int) -> None:
    compare(*make(71, [300, 131], D=D, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("G", [1, 3, 16])
@pytest.mark.parametrize("T", [1, 2, 7, 63, 130])
def test_groups_and_lengths(dtype: torch.dtype, G: int, T: int) -> None:
    got = compare(*make(T, [T, max(T - 1, 0), T + 90], G=G, dtype=dtype))
    # Every query of heads that it sees something of gives 1 in all.
    given_to_all = got.view(3, G, -1).sum(2)
    torch.testing.assert_close(given_to_all[[0, 2]], torch.full((2, G), float(T)), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_items_of_many_tiles(dtype: torch.dtype) -> None:
    compare(*make(1000, [1000], D=64, dtype=dtype))
    compare(*make(9, [5001, 2999, 0, 1], D=64, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("gaps", [False, True])
def test_positions_window_softcap_bias(dtype: torch.dtype, gaps: bool) -> None:
    case = make(90, [333, 0, 17, 256], dtype=dtype, start=11, gaps=gaps)
    compare(*case)
    compare(*case, window=40)
    compare(*case, softcap=2.0)
    biased = make(90, [333, 0, 17, 256], dtype=dtype, start=11, gaps=gaps, bias=True)
    compare(*biased)
    compare(*biased, softcap=3.0, window=100)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sums_over_other_segments_too(dtype: torch.dtype) -> None:
    """The log-sum-exp is of the whole layer: this segment gets its share."""
    q, segment, positions = make(50, [120, 77], dtype=dtype)
    spec = AttentionSpec(scale=q.shape[-1] ** -0.5)
    lse = prefill(q, segment, spec=spec, query_positions=positions).lse
    whole = compare(q, segment, positions, lse=lse)
    half = compare(q, segment, positions, lse=lse + torch.tensor(2.0).log())
    torch.testing.assert_close(half, whole / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_queries_that_see_nothing(dtype: torch.dtype) -> None:
    q, segment, positions = make(40, [60, 0], dtype=dtype, start=100)
    assert not compare(q, segment, positions - 80).any()  # queries at 40 .. 79: before the segment
    assert compare(q, segment, positions - 30).any()  # some rows before, some inside
    assert not compare(q, segment, positions + 500, window=100).any()  # it has left the model's window
    # A query that saw nothing anywhere divides by nothing.
    nothing = torch.full(q.shape[:2], -torch.inf)
    assert not compare(q, segment, positions, lse=nothing).any()
    nothing[3] = 0.0
    assert compare(q, segment, positions, lse=nothing).any()


def test_hidden_entries_stay_hidden() -> None:
    """A bias of -inf, and logits that would overflow were they not masked."""
    q, segment, positions = make(30, [100], dtype=F32, bias=True)
    assert segment.bias is not None
    segment.bias[0, 10:20] = -torch.inf
    got = compare(q, segment, positions)
    assert not got[:, 10:20].any()
    later = replace(segment, bias=None, k=segment.k.clone())
    later.k[0, 95:100] = 1e3 * q[0, 0]
    got = compare(q, later, positions - 20, scale=1.0)
    assert got.isfinite().all()
    assert not got[:, 80:].any()


def test_no_queries_and_no_entries(isa: str) -> None:
    q, segment, positions = make(4, [9])
    spec = AttentionSpec(scale=1.0)
    none = native.mass(q[:0], segment, spec, positions[:0], torch.zeros(0, 2))
    torch.testing.assert_close(none, torch.zeros(2, 9))
    q, segment, positions = make(4, [0, 0])
    assert native.mass(q, segment, spec, positions, torch.zeros(4, 4)).shape == (4, 0)


def test_strided_operands() -> None:
    q, segment, positions = make(50, [140, 77], dtype=BF16)
    spec = AttentionSpec(scale=32**-0.5)
    lse = prefill(q, segment, spec=spec, query_positions=positions).lse
    want = compare(q, segment, positions, lse=lse)
    got = compare(*strided(q, segment), positions, lse=lse.T.contiguous().T)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_poisoned_outputs_are_overwritten(isa: str, poisoned: None) -> None:
    q, segment, positions = make(70, [60, 0, 33], dtype=BF16, start=40)
    got = native.mass(q, segment, AttentionSpec(scale=0.2), positions - 20, torch.ones(70, 6))
    assert not got.isnan().any()
    assert not got[2:4].any()
    assert not got[4:, 33:].any()


def test_threads_change_nothing(isa: str) -> None:
    q, segment, positions = make(300, [2000, 1311], D=64, dtype=BF16)
    lse = torch.ones(300, 4)
    spec = AttentionSpec(scale=0.1)
    many = native.mass(q, segment, spec, positions, lse)
    with one_thread():
        one = native.mass(q, segment, spec, positions, lse)
    torch.testing.assert_close(many, one, rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 120),
    S=st.integers(2, 400),
    cut=st.integers(1, 399),
    G=st.integers(1, 5),
    dtype=st.sampled_from([F32, BF16]),
    gaps=st.booleans(),
    window=st.none() | st.integers(1, 200),
    ahead=st.integers(0, 150),
)
def test_two_segments_make_one(
    T: int, S: int, cut: int, G: int, dtype: torch.dtype, gaps: bool, window: int | None, ahead: int
) -> None:
    cut = min(cut, S - 1)
    q, whole, positions = make(T, [S], G=G, dtype=dtype, gaps=gaps, ahead=ahead)
    spec = AttentionSpec(scale=0.2, window=window)
    lse = prefill(q, whole, spec=spec, query_positions=positions).lse
    one = compare(q, whole, positions, lse=lse, scale=0.2, window=window)
    parts = [native.mass(q, part, spec, positions, lse) for part in halves(whole, cut)]
    rtol, atol = MASS[dtype]
    torch.testing.assert_close(torch.cat(parts, 1), one, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": torch.float16}, "float16"), ({"D": 24}, "multiples of 16"), ({"scale": -1.0}, "scale")],
)
def test_what_it_cannot_take_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    q, segment, positions = make(4, [9], D=change.get("D", 32), dtype=change.get("dtype", F32))
    spec, lse = AttentionSpec(scale=change.get("scale", 1.0)), torch.ones(4, 2)
    with pytest.raises(ValueError, match=message):
        mass(q, segment, spec=spec, query_positions=positions, lse=lse, backend="native")
    got = mass(q, segment, spec=spec, query_positions=positions, lse=lse)  # auto takes the reference
    torch.testing.assert_close(got, reference.mass(q, segment, spec, positions, lse), rtol=0, atol=0)


def test_contradicting_shapes_are_refused() -> None:
    q, segment, positions = make(4, [9])
    spec, lse = AttentionSpec(scale=1.0), torch.ones(4, 2)
    for wrong, message in (
        ({"lse": lse.T}, "lse"),
        ({"lse": lse.double()}, "lse"),
        ({"query_positions": positions.long()}, "query_positions"),
    ):
        call: dict[str, Any] = {"spec": spec, "query_positions": positions, "lse": lse} | wrong
        with pytest.raises(ValueError, match=message):
            mass(q, segment, **call, backend="native")
    too_long = replace(segment, lengths=torch.tensor([99], dtype=torch.int32))
    with pytest.raises(ValueError, match="lengths"):
        mass(q, too_long, spec=spec, query_positions=positions, lse=lse, backend="native")
