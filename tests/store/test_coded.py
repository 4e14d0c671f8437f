"""Codecs whose codes a decode step reads: the store's planes, as the kernel is given them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels import backend
from winnow.kernels.coded_decode import coded_decode, reference
from winnow.kernels.decode import decode
from winnow.store import EncodedSegment, SequenceStore
from winnow.types import AttentionSpec, Demotion, Plan, Rewrite, Selection

HEADS, GROUP = 2, 4
CODECS = [
    "int8",
    "int4",
    "int2",
    "separable:8",
    "separable:4",
    "separable:2",
    "gear4:4",
    "gear2:3",
    "gear-l4:2",
]
NATIVE = pytest.mark.skipif(backend.extension() is None, reason="no native kernels")


def entries(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(n + d)
    k, v = torch.randn(2, n, HEADS, d, generator=make)
    k[..., 3] *= 20  # keys have channels of outliers
    k[..., 5] = 1.5  # and some never change
    v[7] = 0.25
    return k.to(dtype), v.to(dtype)


def encoded(
    codec: str, *, d: int = 64, dtype: torch.dtype = torch.float32, ragged: bool = False
) -> SequenceStore:
    """Six pages of one codec in two batches; with ``ragged`` listed ones, four and three."""
    store = SequenceStore(layers=1, heads=HEADS, head_dim=d, dtype=dtype, capacity=700)
    k, v = entries(500, d, dtype)
    store.append(0, k, v, torch.arange(500))
    store.advance(500)
    if ragged:
        first, second = torch.arange(0, 384, 2), torch.arange(385, 449)
        for lists in ((first, first), (second, second[:0])):
            store.apply(0, Plan(demote=(Demotion(entries=lists, codec=codec),)))
    else:
        for oldest in (128, 384):
            store.apply(0, Plan(demote=(Demotion(oldest=oldest, codec=codec),)))
    return store


def segment_of(store: SequenceStore) -> EncodedSegment:
    (found,) = (s for s in store.segments(0) if s.codec != "raw")
    assert isinstance(found, EncodedSegment)
    return found


def query(d: int, dtype: torch.dtype) -> Tensor:
    q = torch.randn(HEADS * GROUP, d, generator=torch.Generator().manual_seed(9))
    q[:, 3] /= 20
    return q.to(dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_the_kernels_tables_say_what_the_codec_decodes(codec: str, ragged: bool) -> None:
    with encoded(codec, ragged=ragged) as store:
        segment = segment_of(store)
        coded, whole = segment.form.coded(segment), segment.decode()  # type: ignore[attr-defined]
        for head, n in enumerate(segment.lengths.tolist()):
            k, v = reference.decoded(coded, head)
            torch.testing.assert_close(k, whole.k[head, :n], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(v, whole.v[head, :n], rtol=1e-6, atol=1e-6)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("codec", CODECS)
def test_attention_over_codes_is_attention_over_what_they_decode_to(
    codec: str, d: int, dtype: torch.dtype
) -> None:
    for ragged in (False, True):
        with encoded(codec, d=d, dtype=dtype, ragged=ragged) as store:
            segment, q = segment_of(store), query(d, dtype)
            for position, window in ((5000, None), (300, None), (400, 150)):
                spec = AttentionSpec(scale=d**-0.5, window=window)
                direct = segment.attend(q, spec=spec, position=position)
                assert direct is not None
                plain = decode(q, segment.decode(), spec=spec, position=position)
                atol = 5e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(direct.out, plain.out, atol=atol, rtol=0)
                torch.testing.assert_close(direct.lse, plain.lse, atol=atol, rtol=0)
                assert direct.pairs == plain.pairs


@NATIVE
def test_what_codes_do_not_serve_is_decoded() -> None:
    spec = AttentionSpec(scale=0.125)
    with encoded("int4") as store:
        segment, q = segment_of(store), query(64, torch.float32)
        one = Selection(indices=torch.zeros(HEADS, 1).int(), counts=torch.ones(HEADS).int())
        assert segment.attend(q, spec=spec, position=900, selection=one) is None
        assert segment.attend(q, spec=spec, position=900, want_logits=True) is None
        assert segment.attend(q, spec=spec, position=900, backend="reference") is None
        assert segment.attend(q, spec=AttentionSpec(scale=1.0, softcap=9.0), position=900) is None
        bias = Rewrite(
            entries=torch.tensor([450]), k=torch.ones(1, 64), v=torch.ones(1, 64), bias=torch.ones(1)
        )
        store.apply(0, Plan(rewrite=(bias, None)))
        store.apply(0, Plan(demote=(Demotion(oldest=448, codec="int4"),)))
        assert segment_of(store).bias is not None
        assert segment_of(store).attend(q, spec=spec, position=900) is None


@NATIVE
def test_more_of_a_codec_is_seen_at_once() -> None:
    """What the kernel knows of a segment is looked up once: a run that grows must not be read as it was."""
    spec, q = AttentionSpec(scale=0.125), query(64, torch.float32)
    with encoded("separable:4") as store:
        before = segment_of(store).attend(q, spec=spec, position=900)
        store.apply(0, Plan(demote=(Demotion(oldest=448, codec="separable:4"),)))
        segment = segment_of(store)
        after = segment.attend(q, spec=spec, position=900)
        assert before is not None
        assert after is not None
        assert after.pairs - before.pairs == HEADS * GROUP * 64
        plain = coded_decode(
            q,
            segment.form.coded(segment),  # type: ignore[attr-defined]
            spec=spec,
            position=900,
            backend="reference",
        )
        torch.testing.assert_close(after.out, plain.out, atol=5e-5, rtol=0)
