"""ZipCache against its paper's formulas, written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.parity.one_layer import drive, streams
from winnow.compression.actions.grade import Grade
from winnow.compression.scorers.probe_attention import ProbeAttention
from winnow.kernels.quantize import Quantized, dequantize
from winnow.methods import load
from winnow.store import SequenceStore
from winnow.store.arena import PAGE
from winnow.store.codecs import ENTRIES, codec_named
from winnow.types import AttentionSpec, Budget, Observation, Scores, Segment

HEADS, GROUP = 2, 2


def observed(q: Tensor, k: Tensor, probes: Tensor, window: int | None = None) -> Observation:
    n, size = k.shape[0], k.shape[2]
    segment = Segment(
        k=k.transpose(0, 1), v=k.transpose(0, 1), lengths=torch.full((HEADS,), n, dtype=torch.int32)
    )
    return Observation(
        layer=0,
        layers=1,
        spec=AttentionSpec(scale=size**-0.5, window=window),
        segment=segment,
        tokens=n,
        queries=q[probes],
        query_positions=probes.int(),
    )


def attention(q: Tensor, k: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """``[H * G, T, T]`` causal attention, and ``[T, T]`` who sees whom."""
    tokens = q.shape[0]
    logits = torch.einsum("tnd,snd->nts", q, k.repeat_interleave(GROUP, 1)) * q.shape[2] ** -0.5
    gap = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    seen = gap >= 0 if window is None else (gap >= 0) & (gap < window)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1), seen


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("some", [False, True])
def test_saliency_is_the_mean_over_the_queries_that_see_an_entry(some: bool, window: int | None) -> None:
    q, k, _ = streams(150, heads=HEADS, group=GROUP)
    probes = torch.cat([torch.arange(3, 130, 11), torch.arange(130, 150)]) if some else torch.arange(150)
    a, seen = attention(q, k, window)
    visible = seen[probes].sum(0)
    expected = a[:, probes].sum(1) / visible.clamp(min=1)
    got = ProbeAttention().score(observed(q, k, probes, window), None).value
    torch.testing.assert_close(got, expected.view(HEADS, GROUP, -1).sum(1), atol=1e-6, rtol=1e-5)


def test_uniform_attention_favours_nobody_where_the_released_divisor_does() -> None:
    """With equal attention to all, the early and the recent differ by the 1/i of causal rows only."""
    n = 1000
    _, k, _ = streams(n, heads=HEADS, group=GROUP)
    q = torch.zeros(n, HEADS * GROUP, 16)
    drawn = torch.randperm(950, generator=torch.Generator().manual_seed(0))[:50].sort().values
    probes = torch.cat([drawn, torch.arange(950, n)])
    ours = ProbeAttention().score(observed(q, k, probes), None).value[0]
    a, seen = attention(q, k)
    exact = (a.sum(1) / seen.sum(0))[:GROUP].sum(0)
    released = a[:GROUP, probes].sum((0, 1)) / torch.arange(n, 0, -1)
    early, recent = slice(100, 300), slice(940, 960)
    bias = (ours[recent].mean() / ours[early].mean()) / (exact[recent].mean() / exact[early].mean())
    theirs = (released[recent].mean() / released[early].mean()) / (exact[recent].mean() / exact[early].mean())
    assert 0.7 < bias < 1.4
    assert theirs > 5


def test_the_lowest_share_of_every_head_gets_two_bits_and_nothing_is_rounded_twice() -> None:
    prompt, tokens, every = 330, 620, 128
    q, k, v = streams(tokens, heads=HEADS, group=GROUP)
    steps = drive(load("zipcache", every=every, recent=40, random=30), q, k, v, prompt=prompt)
    # What a probe sees of the prompt, with the probes that the engine draws.
    others = torch.randperm(prompt - 40, generator=torch.Generator().manual_seed(prompt))[:30]
    probes = torch.cat([others.sort().values, torch.arange(prompt - 40, prompt)])
    a, seen = attention(q[:prompt], k[:prompt])
    p = (a[:, probes].sum(1) / seen[probes].sum(0)).view(HEADS, GROUP, -1).sum(1)
    graded = prompt // ENTRIES * ENTRIES
    low = round(graded * 0.4 / ENTRIES) * ENTRIES
    for h in range(HEADS):
        order = p[h, :graded].argsort(stable=True)
        for bits, members in ((2, order[:low].sort().values), (4, order[low:].sort().values)):
            codec = codec_named(f"separable:{bits}")
            rows = codec.encode(k[members, h], v[members, h])
            pages = len(members) // ENTRIES
            once = [plane.once for plane in codec.planes(16, torch.float32)]
            spread = tuple(r.expand(pages, -1) if o else r for r, o in zip(rows, once, strict=True))
            k_back, v_back = codec.decode(spread, torch.float32)
            for step in steps[:: len(steps) - 1]:  # just after the prompt, and after two more gradings
                assert torch.equal(step.k[h][members], k_back)
                assert torch.equal(step.v[h][members], v_back)
    # Newest entries stay as computed, and while decoding every 128 tokens are graded, whole pages of them.
    first, last = steps[0], steps[-1]
    assert torch.equal(first.k[0][graded:], k[graded:prompt, 0])
    end = (prompt + every * ((tokens - prompt) // every)) // ENTRIES * ENTRIES
    assert torch.equal(last.k[0][end:], k[end:, 0])
    assert not torch.equal(last.k[0][graded:end], k[graded:end, 0])


def encoded(bits: int, n: int = 192, size: int = 32) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    make = torch.Generator().manual_seed(bits)
    k = torch.randn(n, size, generator=make) * torch.logspace(-1, 1, size)
    v = torch.randn(n, size, generator=make) * torch.logspace(1, -1, size)
    return k, v, codec_named(f"separable:{bits}").encode(k, v)


def per_page(bits: int, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    pages = rows[0].shape[0] // ENTRIES
    planes = codec_named(f"separable:{bits}").planes(32, torch.float32)
    return tuple(r.expand(pages, -1) if p.once else r for r, p in zip(rows, planes, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_encoding_what_was_decoded_gives_the_same_codes(bits: int) -> None:
    _, _, rows = encoded(bits)
    codec = codec_named(f"separable:{bits}")
    again = codec.encode(*codec.decode(per_page(bits, rows), torch.float32))
    k_codes, v_codes = again[0], again[3]
    # The scale of K is rounded outwards to bfloat16 anew: up to 2^-8 wider, which 255 steps can feel.
    apart = (k_codes.int() - rows[0].int()).abs()
    assert int(apart.max()) <= (1 if bits == 8 else 0)
    assert (v_codes != rows[3]).float().mean() < 0.02 or bits == 8  # c is measured anew on rounded values


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_rounded_after_their_channels_were_brought_to_like_size(bits: int) -> None:
    _, v, rows = encoded(bits)
    _, back = codec_named(f"separable:{bits}").decode(per_page(bits, rows), torch.float32)
    c = v.abs().amax(0).sqrt()
    torch.testing.assert_close(rows[6][0].float(), c, rtol=2**-8, atol=0)
    scaled = v / c
    step = (scaled.amax(1) - scaled.amin(1)) / (2**bits - 1)
    bound = step[:, None] / 2 * c * (1 + 2**-5) + v.abs() * 2**-7 + 2e-2 * c / 2**bits
    assert bool(((back - v).abs() <= bound).all())
    # The same bits without c: a token's scale is then that of its largest channel.
    plain = v.amax(1, keepdim=True) - v.amin(1, keepdim=True)
    q = Quantized(codes=rows[3], scale=rows[4], zero=rows[5], bits=bits, axis="token", group=32)
    assert dequantize(q, torch.float32).shape == v.shape
    small = slice(24, 32)
    assert (back - v)[:, small].abs().mean() < plain.mean() / (2**bits - 1) / 4 / 4


def test_bytes_are_saved_in_memory_not_on_paper() -> None:
    n, size = 4096, 64
    make = torch.Generator().manual_seed(0)
    k = torch.randn(n, HEADS, size, generator=make).bfloat16()
    with SequenceStore(layers=1, heads=HEADS, head_dim=size, dtype=torch.bfloat16, capacity=n) as store:
        store.append(0, k, k, torch.arange(n))
        store.advance(n)
        before = sum(store.bytes().values())
        seen = dataclasses.replace(observed(k, k, torch.arange(9)), segment=store.decoded(0), tokens=n)
        scores = Scores(
            value=torch.rand(HEADS, n, generator=make),
            protected=torch.zeros(HEADS, n, dtype=torch.bool),
            lengths=torch.full((HEADS,), n, dtype=torch.int32),
        )
        grade = Grade()
        store.apply(0, grade.plan(seen, scores, Budget(entries=scores.lengths), grade.state()))
        after = sum(store.bytes().values())
        low = round(n * 0.4 / ENTRIES) * ENTRIES
        lengths = {s.codec: s.lengths.tolist() for s in store.segments(0)}
    assert lengths == {"separable:2": [low] * HEADS, "separable:4": [n - low] * HEADS}
    # Codes, a scale and a zero per token, a position; three rows of scales per head and grade.
    exact = HEADS * (low * (size // 2 + 4 + 4) + (n - low) * (size + 4 + 4) + 2 * 3 * size * 2)
    tables = 7 + 1 + 1  # planes, which rows a page reads, positions
    assert exact <= after <= exact + HEADS * 2 * tables * PAGE + n // ENTRIES * 4 * HEADS
    assert after < 0.3 * before


def test_two_grades_of_the_same_bits_are_one_form() -> None:
    q, k, v = streams(330, heads=HEADS, group=GROUP)
    (step,) = drive(load("zipcache", high=8, low=8, recent=40, random=30), q, k, v, prompt=330)
    assert step.positions == [list(range(330))] * HEADS
    error = (step.k[0] - k[:, 0]).abs()
    assert 0 < error[:320].max() < 0.03
    assert error[320:].max() == 0
