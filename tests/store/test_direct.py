"""Codecs that leave channels out, and attention over what they store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from winnow.kernels.decode import decode
from winnow.store import EncodedSegment, SequenceStore, files
from winnow.store.codecs import ENTRIES, bytes_per_entry, codec_named
from winnow.types import AttentionSpec, Demotion, Plan, Rewrite, Selection

HEADS, GROUP, D = 2, 3, 64
SPEC = AttentionSpec(scale=D**-0.5)


def filled(n: int, *, capacity: int = 2000, dtype: torch.dtype = torch.float32) -> SequenceStore:
    store = SequenceStore(layers=1, heads=HEADS, head_dim=D, dtype=dtype, capacity=capacity)
    make = torch.Generator().manual_seed(n)
    k, v = torch.randn(2, n, HEADS, D, generator=make).to(dtype)
    store.append(0, k, v, torch.arange(n))
    store.advance(n)
    return store


def channels(count: int, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(D, generator=make)[:count].sort().values for _ in range(HEADS)])


def thin(entries: int | tuple[Tensor, ...], count: int = 39, seed: int = 0) -> Plan:
    what = {"entries": entries} if isinstance(entries, tuple) else {"oldest": entries}
    return Plan(demote=(Demotion(**what, codec=f"thin:{count}", channels=channels(count, seed)),))


def encoded(store: SequenceStore) -> EncodedSegment:
    (segment,) = (s for s in store.segments(0) if s.codec != "raw")
    assert isinstance(segment, EncodedSegment)
    return segment


def same_as_decoded(segment: EncodedSegment, dtype: torch.dtype, **options: object) -> None:
    q = torch.randn(HEADS * GROUP, D, generator=torch.Generator().manual_seed(9)).to(dtype)
    given = {"spec": SPEC, "position": 5000, "want_logits": True} | options
    direct = segment.attend(q, **given)
    assert direct is not None
    plain = decode(q, segment.decode(), **given)
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(direct.out, plain.out, atol=atol, rtol=0)
    torch.testing.assert_close(direct.lse, plain.lse, atol=atol, rtol=0)
    torch.testing.assert_close(direct.logits, plain.logits, atol=atol, rtol=0)
    assert direct.pairs == plain.pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("count", [1, 39, 64])
def test_thin_keys_are_attended_to_as_they_lie(dtype: torch.dtype, backend: str, count: int) -> None:
    with filled(400, dtype=dtype) as store:
        store.apply(0, thin(320, count))
        if count == 64:  # nothing left out is no smaller, so nothing was demoted
            assert [s.codec for s in store.segments(0)] == ["raw"]
            return
        segment = encoded(store)
        same_as_decoded(segment, dtype, backend=backend)
        same_as_decoded(segment, dtype, backend=backend, position=200)
        lists = torch.randperm(320)[:50].sort().values.int().expand(HEADS, -1).contiguous()
        chosen = Selection(indices=lists, counts=torch.tensor([50, 20], dtype=torch.int32))
        same_as_decoded(segment, dtype, backend=backend, selection=chosen)
        per_query = Selection(
            indices=lists[:1].repeat(HEADS * GROUP, 1), counts=torch.full((HEADS * GROUP,), 9).int()
        )
        same_as_decoded(segment, dtype, backend=backend, selection=per_query)
        window = AttentionSpec(scale=0.3, window=150, softcap=20.0)
        same_as_decoded(segment, dtype, backend=backend, spec=window, position=330)


def test_pages_of_other_channels_ragged_heads_and_biases() -> None:
    with filled(700) as store:
        first = (torch.arange(64), torch.arange(0, 256, 2))
        store.apply(0, thin(first, seed=1))
        second = (torch.arange(100, 228), torch.arange(300, 364))
        store.apply(0, thin(second, seed=2))
        rewritten = Rewrite(
            entries=torch.tensor([3, 120]),
            k=torch.randn(2, D),
            v=torch.randn(2, D),
            bias=torch.tensor([0.7, -1]),
        )
        store.apply(0, Plan(rewrite=(None, rewritten)))
        segment = encoded(store)
        assert segment.lengths.tolist() == [192, 192]
        assert segment.bias is not None
        same_as_decoded(segment, torch.float32)
        # A list over pages of unlike channels goes through decoding.
        one = Selection(indices=torch.zeros(HEADS, 1).int(), counts=torch.ones(HEADS).int())
        assert segment.attend(torch.randn(HEADS * GROUP, D), spec=SPEC, position=900, selection=one) is None


def test_thin_keys_survive_every_move_unchanged() -> None:
    """What was left out stays zero, what was kept is never rounded: whatever is dropped around it."""
    with filled(400) as store:
        before = store.decoded(0)
        wanted, v = before.k.clone(), before.v.clone()
        gone = torch.ones(HEADS, D, dtype=torch.bool).scatter_(1, channels(39), False)
        wanted[:, :320][gone[:, None].expand(-1, 320, -1)] = 0
        store.apply(0, thin(320))
        keep = (torch.arange(0, 400, 2), torch.cat([torch.arange(70), torch.arange(300, 400)]))
        store.apply(0, Plan(keep=keep))
        assert encoded(store).lengths.tolist() == [128, 64]
        after = store.decoded(0)
        for head, kept in enumerate(keep):
            assert torch.equal(after.k[head, : len(kept)], wanted[head, kept])
            assert torch.equal(after.v[head, : len(kept)], v[head, kept])


def test_channels_that_do_not_fit_are_refused() -> None:
    with filled(200) as store:
        before = store.segments(0)
        for codec, given, said in [
            ("thin:39", channels(38), "takes"),
            ("thin:39", channels(39).flip(1), "ascending"),
            ("thin:39", channels(39) + 40, "below 64"),
            ("int8", channels(39), "stores all of them"),
            ("thin:65", None, "64 channels"),
        ]:
            with pytest.raises(ValueError, match=said):
                store.apply(0, Plan(demote=(Demotion(oldest=64, codec=codec, channels=given),)))
        assert store.segments(0) == before
        for name, said in [("thin:0", "at least"), ("thin", "did you mean"), ("separable:3", "8, 4 or 2")]:
            with pytest.raises(ValueError, match=said):
                codec_named(name)


def test_what_is_encoded_together_shares_its_scales() -> None:
    size = bytes_per_entry(codec_named("separable:4"), D, torch.float32)
    with filled(64 * ENTRIES, capacity=5000) as store:
        store.apply(0, Plan(demote=(Demotion(oldest=64 * ENTRIES, codec="separable:4"),)))
        assert size == D + 4
        assert encoded(store).bytes_per_entry == size + 1  # 3 rows of 64 bfloat16 on 4096 entries
        held = sum(store.bytes().values())
        assert held < HEADS * (64 * ENTRIES * size + 8 * 4096)
    with filled(4 * ENTRIES) as store:
        for page in range(1, 5):
            store.apply(0, Plan(demote=(Demotion(oldest=page * ENTRIES, codec="separable:4"),)))
        assert encoded(store).lengths.tolist() == [256, 256]
        assert encoded(store).bytes_per_entry == size + 3 * D * 2 // ENTRIES


def test_shared_scales_and_biases_come_back_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    with filled(500) as store:
        store.apply(0, Plan(demote=(Demotion(oldest=128, codec="separable:2"),)))
        lists = (torch.arange(200, 328), torch.arange(300, 364))
        store.apply(0, Plan(demote=(Demotion(entries=lists, codec="separable:2"),)))
        bias = Rewrite(
            entries=torch.tensor([1, 450]),
            k=torch.randn(2, D),
            v=torch.randn(2, D),
            bias=torch.tensor([1.5, 2]),
        )
        store.apply(0, Plan(rewrite=(bias, None)))
        files.save(store, path, {})
        again, _ = files.load(path)
        with again:
            a, b = store.decoded(0), again.decoded(0)
            assert a.bias is not None
            for x, y in ((a.k, b.k), (a.v, b.v), (a.bias, b.bias)):
                assert torch.equal(x, y)
            assert store.bytes() == again.bytes()
            # More of the same kind goes behind what came back.
            for one in (store, again):
                one.apply(0, Plan(demote=(Demotion(oldest=448, codec="separable:2"),)))
            assert torch.equal(store.decoded(0).k, again.decoded(0).k)


def test_a_sliding_window_moves_nothing() -> None:
    """Attention sinks and a window: after the first step, what stays lies where it lay."""
    with filled(1000) as store:
        k = torch.randn(1, HEADS, D)
        address = None
        for step in range(200):
            n = store.lengths(0)[0]
            window = torch.cat([torch.arange(4), torch.arange(n - 500, n)])
            store.apply(0, Plan(keep=(window,) * HEADS))
            sinks, tail = store.segments(0)
            assert sinks.positions_of(1).tolist() == [0, 1, 2, 3]
            assert tail.positions is None
            assert tail.positions_of(0).tolist() == list(range(1000 + step - 500, 1000 + step))
            newest = tail.k[0, 499].data_ptr()
            assert address is None or newest == address + D * 4  # the next slot, nothing was moved up
            address = newest
            store.append(0, k, k, torch.tensor([1000 + step]))
            store.advance(1)
        held = store.bytes()[("host", "raw")]
        assert held < HEADS * 2 * (510 * D * 4 + 2 * 4096)
