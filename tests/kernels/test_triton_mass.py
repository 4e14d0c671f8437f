"""The Triton mass kernel, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.test_triton_prefill import F16, F32, PLAIN, positions, queries, segment
from tests.kernels.tolerances import MASS
from tests.kernels.triton_process import interpreted, needs_triton
from winnow.kernels.mass import mass
from winnow.kernels.prefill import prefill
from winnow.types import AttentionSpec, Segment

pytestmark = needs_triton


def check(q: Tensor, s: Segment, spec: AttentionSpec, q_pos: Tensor) -> Tensor:
    lse = prefill(q, s, spec=spec, query_positions=q_pos, backend="reference").lse
    call = {"spec": spec, "query_positions": q_pos, "lse": lse}
    got: Tensor = interpreted("winnow.kernels.mass:mass", q, s, backend="triton", **call)
    want = mass(q, s, backend="reference", **call)
    rtol, atol = MASS[q.dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    return got


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("heads", "D"), [(2, 16), (6, 24), (2, 64)])
def test_dense(heads: int, D: int, dtype: torch.dtype) -> None:
    s = segment([131, 77], D, dtype)
    got = check(queries(75, heads, D, dtype), s, PLAIN, positions(56, 75))
    assert not got[heads // 2 :, 77:].any()


@pytest.mark.parametrize("first", [0, 30, 80, 500])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(
    "spec", [PLAIN, AttentionSpec(scale=0.3, window=40, softcap=2.0)], ids=["plain", "all"]
)
def test_every_option(spec: AttentionSpec, gaps: bool, first: int) -> None:
    s = segment([100, 0, 31], 24, gaps=gaps, bias=gaps, start=5, interleaved=True)
    check(queries(70, 3, 24), s, spec, positions(first, 70))


def test_long_calls_have_whole_tiles() -> None:
    """Some tiles are seen by every query of a block, and with a window some blocks are behind it."""
    s = segment([300, 290], 16)
    check(queries(300, 2, 16), s, PLAIN, positions(0, 300))
    check(queries(300, 2, 16), s, AttentionSpec(scale=0.2, window=120), positions(0, 300))


def test_nothing_to_see() -> None:
    got = check(queries(5, 2, 16), segment([20, 0], 16, start=50), PLAIN, positions(10, 5))
    assert got.shape == (2, 20)
    assert not got.any()
