"""Codecs keep their promises: size, error, page by page, through the store and out again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from winnow.kernels.merge import merge
from winnow.kernels.prefill import prefill
from winnow.store import EncodedSegment, SequenceStore
from winnow.store.codecs import CODECS, ENTRIES, bytes_per_entry, codec_named
from winnow.types import AttentionSpec, Demotion, Dense, Plan, Segment, Selection

QUANTISED = ["int8", "int4", "int2"]
HEADS = 2


def keys_and_values(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(n + d)
    k = torch.randn(n, HEADS, d, generator=gen)
    k[..., 3] *= 20  # an outlier channel, as keys have
    return k.to(dtype), torch.randn(n, HEADS, d, generator=gen).to(dtype)


def demoted(
    codec: str, n: int, d: int = 64, dtype: torch.dtype = torch.float32, **plan: object
) -> SequenceStore:
    k, v = keys_and_values(n, d, dtype)
    store = SequenceStore(layers=1, heads=HEADS, head_dim=d, dtype=dtype, capacity=n + 100)
    store.append(0, k, v, torch.arange(n))
    store.advance(n)
    store.apply(0, Plan(demote=(Demotion(oldest=n // ENTRIES * ENTRIES, codec=codec, **plan),)))
    return store


def rounding(codec: str, x: Tensor, *, keys: bool) -> Tensor:
    """Largest error that the form allows for every value of ``[n, D]``, from the form's definition."""
    n, d = x.shape
    x = x.float()
    if codec == "int8":
        step = x.abs().amax(-1, keepdim=True) / 127
        step = step.expand(n, d)
    elif keys:
        pages = x.view(n // ENTRIES, ENTRIES, d)
        step = (pages.amax(1, keepdim=True) - pages.amin(1, keepdim=True)).expand_as(pages).reshape(n, d)
        step = step / (2 ** int(codec[3:]) - 1)
    else:
        size = max(g for g in range(1, 33) if d % g == 0)
        groups = x.view(n, d // size, size)
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)).expand_as(groups).reshape(n, d)
        step = step / (2 ** int(codec[3:]) - 1)
    # Scale and zero are bfloat16, rounded outwards: up to 2^-7 wider, and a zero up to 2^-7 lower.
    return step / 2 * (1 + 2**-6) + x.abs().amax() * 2**-8 / 2 ** int(codec[3:]) + 1e-6


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("d", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_half_a_step(codec: str, d: int, dtype: torch.dtype) -> None:
    n = 3 * ENTRIES
    k, v = keys_and_values(n, d, dtype)
    with demoted(codec, n, d, dtype) as store:
        back = store.decoded(0)
        assert back.k.dtype == dtype
        for head in range(HEADS):
            for x, y, keys in ((k, back.k, True), (v, back.v, False)):
                error = (x[:, head].float() - y[head].float()).abs()
                bound = rounding(codec, x[:, head], keys=keys)
                if dtype == torch.bfloat16:
                    bound = bound + y[head].float().abs() * 2**-8  # the result is rounded once more
                assert bool((error <= bound).all()), (error - bound).max()
        worst = (k[:, 0].float() - back.k[0].float()).abs().max()
        assert worst > 0  # something was rounded at all


@pytest.mark.parametrize("codec", QUANTISED)
def test_bytes_are_those_of_the_form(codec: str) -> None:
    d, bits = 64, int(codec[3:])
    exact = 2 * d * bits / 8 + (4 if codec == "int8" else 4 * d / ENTRIES + 4 * d / 32)
    assert bytes_per_entry(codec_named(codec), d, torch.bfloat16) == math.ceil(exact)
    n = 64 * ENTRIES
    with demoted(codec, n, d, torch.bfloat16) as store:
        held = store.bytes()
        assert held[("host", "raw")] == 0
        planes = len(codec_named(codec).planes(d, torch.bfloat16))
        assert HEADS * n * exact <= held[("host", codec)] <= HEADS * (n * exact + planes * 4096)
        (segment,) = store.segments(0)
        assert (segment.codec, segment.tier) == (codec, "host")
        assert segment.bytes_per_entry == math.ceil(exact)


@pytest.mark.parametrize("codec", QUANTISED)
def test_encoded_pages_are_never_decoded_and_encoded_again_by_moves(codec: str) -> None:
    n = 4 * ENTRIES
    with demoted(codec, n) as store:
        before = store.decoded(0)
        store.apply(0, Plan(demote=(Demotion(oldest=2 * ENTRIES, tier="disk"),)))
        assert [(s.codec, s.tier) for s in store.segments(0)] == [(codec, "disk"), (codec, "host")]
        after = store.decoded(0)
        assert torch.equal(before.k, after.k)
        assert torch.equal(before.v, after.v)
        assert after.start == 0
        assert after.positions is None


def test_hierarchy_of_codecs_by_age_and_no_promotion() -> None:
    n = 6 * ENTRIES + 10
    with demoted("int8", n) as store:
        store.apply(0, Plan(demote=(Demotion(oldest=2 * ENTRIES, codec="int4"),)))
        store.apply(0, Plan(demote=(Demotion(oldest=1 * ENTRIES, codec="int2", tier="disk"),)))
        forms = [(s.codec, s.tier, s.lengths.tolist()) for s in store.segments(0)]
        assert forms == [
            ("int2", "disk", [64, 64]),
            ("int4", "host", [64, 64]),
            ("int8", "host", [256, 256]),
            ("raw", "host", [10, 10]),
        ]
        # Lower ones stay what they are.
        store.apply(0, Plan(demote=(Demotion(oldest=6 * ENTRIES, codec="int8"),)))
        store.apply(0, Plan(demote=(Demotion(oldest=6 * ENTRIES, tier="host"),)))
        assert forms == [(s.codec, s.tier, s.lengths.tolist()) for s in store.segments(0)]
        for segment in store.segments(0):
            assert segment.start == int(segment.positions_of(0)[0])


@pytest.mark.parametrize("codec", ["raw", *QUANTISED])
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("rows", [HEADS, HEADS * 3])
def test_gather_equals_indexing_the_decoded_segment(codec: str, page: int, rows: int) -> None:
    n = 5 * ENTRIES
    with demoted(codec, n) as store:
        if codec != "raw":
            k = torch.ones(1, HEADS, 64)
            store.append(0, k, k, torch.tensor([n]))
            store.advance(1)
        segment = store.segments(0)[0]
        whole = segment.decode()
        gen = torch.Generator().manual_seed(page)
        total = n // page
        picks = [torch.randperm(total, generator=gen)[: 3 + r] for r in range(rows)]
        indices = torch.full((rows, 3 + rows), 10**6, dtype=torch.int32)
        for r, pick in enumerate(picks):
            indices[r, : len(pick)] = pick
        counts = torch.tensor([len(pick) for pick in picks], dtype=torch.int32)
        found = segment.gather(Selection(indices=indices, counts=counts, page=page))
        assert found.heads == rows
        for r, pick in enumerate(picks):
            wanted = (pick.sort().values[:, None] * page + torch.arange(page)).flatten()
            assert found.positions_of(r).tolist() == wanted.tolist()
            head = r // (rows // HEADS)
            assert torch.equal(found.k[r, : len(wanted)], whole.k[head, wanted])
            assert torch.equal(found.v[r, : len(wanted)], whole.v[head, wanted])


@pytest.mark.parametrize("codec", QUANTISED)
def test_tile_by_tile_attention_equals_attention_over_the_decoded_segment(codec: str) -> None:
    n, d, group = 7 * ENTRIES, 64, 2
    with demoted(codec, n, d) as store:
        (segment,) = store.segments(0)
        assert isinstance(segment, EncodedSegment)
        q = torch.randn(3, HEADS * group, d, generator=torch.Generator().manual_seed(1))
        positions = torch.arange(n - 3, n, dtype=torch.int32)
        spec = AttentionSpec(scale=d**-0.5)

        def attend(part: Segment):  # type: ignore[no-untyped-def]
            return prefill(q, part, spec=spec, query_positions=positions, form=Dense(), backend="reference")

        tiles = list(segment.tiles(128))
        assert [int(t.lengths.max()) for t in tiles] == [128, 128, 128, 64]
        merged, whole = merge([attend(tile) for tile in tiles]), attend(segment.decode())
        torch.testing.assert_close(merged.out, whole.out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged.lse, whole.lse, atol=1e-5, rtol=1e-5)
        assert merged.pairs == whole.pairs


def test_int2_refuses_a_head_size_that_fills_no_bytes() -> None:
    with SequenceStore(layers=1, heads=1, head_dim=6, dtype=torch.float32, capacity=200) as store:
        k = torch.randn(128, 1, 6)
        store.append(0, k, k, torch.arange(128))
        store.advance(128)
        with pytest.raises(ValueError, match="do not fill bytes"):
            store.apply(0, Plan(demote=(Demotion(oldest=64, codec="int2"),)))
        assert torch.equal(store.segments(0)[0].k[0, :128], k[:, 0])


def test_an_unknown_codec_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'int4'"):
        codec_named("int-4")
    assert set(CODECS) == {"raw", "int8", "int4", "int2"}


@pytest.mark.parametrize("codec", QUANTISED)
def test_entries_dropped_from_encoded_pages_leave_whole_pages(codec: str) -> None:
    n = 4 * ENTRIES + 20
    k, _ = keys_and_values(n, 64, torch.float32)
    keep = (torch.arange(0, n, 2), torch.cat([torch.arange(10), torch.arange(100, n)]))
    with demoted(codec, n) as store:
        first = store.decoded(0)
        store.apply(0, Plan(keep=keep))
        encoded, tail = store.segments(0)
        assert encoded.lengths.tolist() == [128, 128]  # of 128 and of 10 + 156 that survive
        again = store.decoded(0)
        for head, kept in enumerate(keep):
            assert again.positions_of(head).tolist() == kept.tolist()
            # Encoded twice: twice the rounding at most, and the second step is not larger.
            error = (again.k[head, : len(kept)] - k[kept, head]).abs().amax(0)
            once = (first.k[head] - k[:, head]).abs().amax(0)
            assert bool((error <= 3 * once + 1e-3).all())
        assert tail.codec == "raw"
