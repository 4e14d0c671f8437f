"""Decode attention over keys that are a product: the native kernel against rebuilding them first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.tolerances import REBUILT
from winnow.kernels import backend
from winnow.kernels.rebuilt_decode import is_fast, rebuilt_decode, turning
from winnow.models.turning import PairRotary
from winnow.types import AttentionSpec, Factors, Rotary, Segment, Selection

ISAS = backend.isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")


def rotary(pairs: int, first: int = 0, interleaved: bool = False) -> PairRotary:
    frequencies = 10000.0 ** -(torch.arange(pairs) / pairs)
    return PairRotary(frequencies=frequencies, first=first, interleaved=interleaved)


ROTARIES = {
    "none": None,
    "halves": rotary(16),
    "neighbours": rotary(16, interleaved=True),
    "partial": rotary(8, first=8),
    "with a still pair": replace(rotary(16), frequencies=torch.tensor([0.0, *[0.5**i for i in range(15)]])),
}


def made(
    lengths: list[int],
    turned: Rotary | None,
    *,
    width: int = 32,
    rank: int = 10,
    group: int = 4,
    start: int = 70,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[Tensor, Segment, Factors]:
    g = torch.Generator().manual_seed(seed)
    heads, capacity = len(lengths), max(lengths) + 5
    q, v = torch.randn(heads * group, width, generator=g), torch.randn(heads, capacity, width, generator=g)
    left = torch.randn(max(lengths) + 9, rank, generator=g) / rank**0.5
    right = torch.randn(heads, rank, width, generator=g)
    for head, n in enumerate(lengths):
        v[head, n:] = torch.nan
    left[9 + max(lengths) :] = torch.nan
    factors = Factors(left=left.to(dtype), right=right.to(dtype), start=start - 9, rotary=turned)
    v = v.to(dtype)
    stored = Segment(k=v, v=v, lengths=torch.tensor(lengths, dtype=torch.int32), start=start)
    return q.to(dtype), stored, factors


def same(q: Tensor, stored: Segment, factors: Factors, spec: AttentionSpec, **options) -> None:
    first, last = factors.start, factors.start + len(factors.left)
    table = turning(factors.rotary, q.shape[1], first, last)
    assert table is not None
    assert is_fast(q, stored, factors, spec, "auto")
    ours, oracle = (
        rebuilt_decode(q, stored, factors, table, spec=spec, want_logits=True, backend=of, **options)
        for of in ("native", "reference")
    )
    tolerance = REBUILT[q.dtype]
    assert ours.pairs == oracle.pairs
    for a, b in (
        (ours.out.float(), oracle.out.float()),
        (ours.lse, oracle.lse),
        (ours.logits, oracle.logits),
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ROTARIES)
def test_native_equals_rebuilding_first(isa: str, name: str, dtype: torch.dtype) -> None:
    q, stored, factors = made([130, 77], ROTARIES[name], dtype=dtype)
    same(q, stored, factors, AttentionSpec(scale=32**-0.5), position=1000)
    chunks = Selection(
        indices=torch.tensor([[0, 3, 4, 15], [9, 2, 1, 7]], dtype=torch.int32),
        counts=torch.tensor([4, 3], dtype=torch.int32),
        page=8,
    )
    same(q, stored, factors, AttentionSpec(scale=32**-0.5), position=1000, selection=chunks)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_shape_position_window_and_list(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([16, 48, 64, 80, 128, 256]))
    pairs = data.draw(st.integers(1, width // 2))
    turned = rotary(pairs, data.draw(st.integers(0, width - 2 * pairs)), data.draw(st.booleans()))
    q, stored, factors = made(
        data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3)),
        turned,
        width=width,
        rank=2 * data.draw(st.integers(1, 20)),
        group=data.draw(st.integers(1, 6)),
        start=data.draw(st.integers(9, 300)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=data.draw(st.integers(0, 99)),
    )
    longest, heads = int(stored.lengths.max()), stored.heads
    selection = None
    if data.draw(st.booleans()):
        listed = (
            torch.stack([torch.randperm(longest)[: min(longest, 20)] for _ in range(heads)]).sort(1).values
        )
        valid = listed < stored.lengths[:, None]
        selection = Selection(indices=listed.int(), counts=valid.sum(1).int())
    elif data.draw(st.booleans()):  # the same positions, written out
        table = torch.arange(stored.start, stored.start + longest + 5, dtype=torch.int32)
        stored = replace(stored, positions=table.repeat(heads, 1))
    spec = AttentionSpec(scale=width**-0.5, window=data.draw(st.none() | st.integers(1, 300)))
    backend.force_isa(data.draw(st.sampled_from(ISAS)))
    try:
        position = stored.start + data.draw(st.integers(-3, 250))
        same(q, stored, factors, spec, position=position, selection=selection)
    finally:
        backend.force_isa(ISAS[0])


def test_tables_turn_as_the_rotation_does() -> None:
    for turned in (rotary(32), rotary(32, interleaved=True), rotary(12, first=30)):
        table = turning(turned, 64, 1000, 200_000)
        assert table is not None
        assert table.partner is not None
        at = torch.tensor([1000, 1023, 1024, 77_777, 199_999])
        x = torch.randn(5, 64)
        a, b = table.coarse[at // 64 - table.start], table.fine[at % 64]
        cosine, sine = a[:, 0] * b[:, 0] - a[:, 1] * b[:, 1], a[:, 1] * b[:, 0] + a[:, 0] * b[:, 1]
        got = x * cosine + x[:, table.partner.long()] * sine
        torch.testing.assert_close(got, turned.turn(x, at), rtol=1e-6, atol=2e-6)


class _Mixes:
    """Turns three channels together."""

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        out = x.clone()
        out[..., :3] = x[..., :3].roll(1, -1)
        return out


def test_what_cannot_be_taken_is_said() -> None:
    assert turning(_Mixes(), 16, 0, 64) is None
    q, stored, factors = made([20], None, rank=7)
    spec = AttentionSpec(scale=1.0)
    table = turning(None, 32, 0, 200)
    assert table is not None
    assert not is_fast(q, stored, factors, spec, "auto")
    with pytest.raises(ValueError, match="odd"):
        rebuilt_decode(q, stored, factors, table, spec=spec, position=99, backend="native")
    with pytest.raises(ValueError, match="no Triton kernel"):
        rebuilt_decode(q, stored, factors, table, spec=spec, position=99, backend="triton")
