"""GEAR: its three pieces against plain computations, and its bytes against a count by hand."""

from __future__ import annotations

import pytest
import torch

from tests.parity.one_layer import drive, streams
from winnow.methods import load
from winnow.store.codecs import bytes_per_entry, codec_named
from winnow.store.codecs.gear import Gear


def correlated(tokens: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Keys as models have them: a few strong channels, some structure over tokens, some outliers."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 3, generator=make) @ torch.randn(3, size, generator=make)
    x = x + 0.3 * torch.randn(tokens, size, generator=make)
    x[:, ::11] *= 4
    x[torch.randint(tokens, (20,), generator=make), torch.randint(size, (20,), generator=make)] *= 6
    return x


def rounded(x, bits, dim):
    """Asymmetric quantisation of whole groups along ``dim``, by the formula."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = torch.where(step > 0, (x - low) / step, torch.zeros(())).round()
    return codes * step + low


def by_hand(x, bits, rank, outliers, *, of):
    """Steps 1 to 4 of the paper on one head: K in pages of 64 tokens, V in groups of 32 channels."""
    out, kept = x.clone(), x.clone()
    where = torch.zeros_like(x, dtype=torch.bool)
    if outliers:
        vectors = x.split(64) if of == "k" else [x]
        marks = where.split(64) if of == "k" else [where]
        dim = 0 if of == "k" else 1
        for part, mark in zip(vectors, marks, strict=True):
            for index in (part.argmax(dim, keepdim=True), part.argmin(dim, keepdim=True)):
                mark.scatter_(dim, index, True)
        for part, mark in zip(out.split(64) if of == "k" else [out], marks, strict=True):
            mean = part.mean(dim, keepdim=True).expand_as(part)
            part.copy_(torch.where(mark, mean, part))
    if of == "k":
        near = torch.cat([rounded(part, bits, 0) for part in out.split(64)])
    else:
        near = torch.cat([rounded(part, bits, 1) for part in out.split(32, 1)], 1)
    u, s, v = torch.linalg.svd(out - near, full_matrices=False)
    best = near + (u[:, :rank] * s[:rank]) @ v[:rank]
    return torch.where(where, kept, best), where


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("outliers", [True, False])
def test_each_piece_does_its_part(bits, outliers):
    k, v = correlated(192), correlated(192, seed=1)
    codec = Gear(bits, 4, outliers=outliers)
    ours = codec.decode(codec.encode(k, v), torch.float32)
    for of, x, got in zip("kv", (k, v), ours, strict=True):
        best, where = by_hand(x, bits, 4, outliers, of=of)
        assert torch.equal(got[where], x[where]), "what was taken out comes back as it was"
        # Three rounds of a power iteration and bfloat16 factors, beside the optimum of the same rank.
        assert float((got - x).norm()) <= 1.1 * float((best - x).norm())


@pytest.mark.parametrize("bits", [2, 4])
def test_every_piece_helps(bits):
    for seed in range(4):
        k, v = correlated(128, seed=seed), correlated(128, seed=seed + 50)
        errors = []
        for codec in (Gear(bits, 4), Gear(bits, 4, outliers=False), codec_named(f"int{bits}")):
            back = codec.decode(codec.encode(k, v), torch.float32)
            errors.append([float((a - b).norm()) for a, b in zip(back, (k, v), strict=True)])
        for of in range(2):
            full, without, plain = (one[of] for one in errors)
            assert full <= without <= plain


def test_a_residual_of_full_rank_leaves_little():
    k, v = correlated(64, size=16), correlated(64, size=16, seed=1)
    back = Gear(2, 16).decode(Gear(2, 16).encode(k, v), torch.float32)
    for x, got in zip((k, v), back, strict=True):
        assert float((got - x).abs().max()) < 0.02 * float(x.abs().max()), "bfloat16 of the factors is left"


def test_constant_blocks_reproduce_themselves():
    k, v = torch.full((64, 32), 0.75), torch.full((64, 32), -2.0)
    back = Gear(4, 2).decode(Gear(4, 2).encode(k, v), torch.float32)
    torch.testing.assert_close(back[0], k)
    torch.testing.assert_close(back[1], v)


def test_bytes_by_hand():
    size, rank = 64, 4
    k = 2 * size // 8 + 2 * 2 * size / 64 + 2 * rank + 2 * size * (2 + 1) / 64
    v = 2 * size // 8 + 2 * 2 * 2 + 2 * rank + 2 * (2 + 1)
    assert bytes_per_entry(codec_named("gear2:4"), size, torch.bfloat16) == k + v
    assert k + v < 0.3 * 2 * 2 * size


def test_decoded_tokens_are_encoded_page_by_page():
    q, k, v = streams(330, size=32)
    steps = drive(load("gear", bits=4, every=64), q, k, v, prompt=100)
    raw = [
        sum(torch.equal(a, b) for a, b in zip(step.k[0], k[: len(step.k[0]), 0], strict=True))
        for step in steps
    ]
    assert raw[0] <= 36 + 2, "one page of the prompt's 100 is encoded at once"
    for step in steps:
        n = len(step.positions[0])
        assert step.positions[0] == list(range(n)), "nothing is dropped"
        assert float((step.k[0] - k[:n, 0]).abs().max()) < 0.5
    late, later = steps[200].k[0][:64], steps[-1].k[0][:64]
    assert torch.equal(late, later), "what is encoded is never encoded again"


def test_refused_by_name():
    with pytest.raises(ValueError, match="rank 0"):
        codec_named("gear4:0")
