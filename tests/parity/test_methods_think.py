"""ThinK against the official scores and attention over keys whose channels were set to zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.one_layer import drive, streams
from winnow.compression.actions.drop import kept
from winnow.compression.actions.thin_keys import ThinKeys, channel_scores
from winnow.methods import load
from winnow.store import SequenceStore
from winnow.store.arena import PAGE
from winnow.store.codecs import ENTRIES
from winnow.types import AttentionSpec, Budget, Observation, Scores

PROMPT, TOKENS, GROUP, HEADS, SIZE = 230, 236, 2, 2, 64


def official(q: Tensor, k: Tensor, percent: int) -> Tensor:
    """``[H, D]`` which channels go: the smallest products of mean squares, the group's mean for GQA."""
    removed = int(k.shape[2] * percent / 100)
    of_q = q[-32:].pow(2).mean(0).view(HEADS, GROUP, -1).mean(1)
    score = of_q * k.pow(2).mean(0)
    gone = torch.zeros_like(score, dtype=torch.bool)
    return gone.scatter_(1, score.topk(removed, dim=1, largest=False).indices, True)


def dense(q: Tensor, k_HSD: list[Tensor], v_HSD: list[Tensor]) -> Tensor:
    """``[H * G, D]`` attention of one query over everything, at the scale of all channels."""
    out = []
    for n in range(HEADS * GROUP):
        h = n // GROUP
        probs = ((k_HSD[h] @ q[n]) * q.shape[1] ** -0.5).softmax(0)
        out.append(probs @ v_HSD[h])
    return torch.stack(out)


@pytest.mark.parametrize("percent", [0, 13, 40, 90])
def test_stored_keys_and_attention_are_those_of_zeroed_channels(percent: int) -> None:
    q, k, v = streams(TOKENS, heads=HEADS, group=GROUP, size=SIZE)
    k[:, :, 3] *= 5
    steps = drive(load("think", percent=percent), q, k, v, prompt=PROMPT)
    gone = official(q[:PROMPT], k[:PROMPT], percent)
    assert gone.sum(1).tolist() == [SIZE * percent // 100] * HEADS
    old = (PROMPT - 32) // 64 * 64
    zeroed = k.clone()
    zeroed[:old][gone.expand(old, -1, -1)] = 0
    for at, step in zip(range(PROMPT - 1, TOKENS), steps, strict=True):
        held = [zeroed[: at + 1, h] for h in range(HEADS)]
        for h in range(HEADS):
            assert torch.equal(step.k[h], held[h])
            assert torch.equal(step.v[h], v[: at + 1, h])
        if at >= PROMPT:  # the prompt's last query attended before anything was thinned
            expected = dense(q[at], held, [v[: at + 1, h] for h in range(HEADS)])
            torch.testing.assert_close(step.out, expected, atol=2e-5, rtol=0)


def test_a_channel_without_keys_goes_first_and_changes_nothing() -> None:
    q, k, v = streams(TOKENS, heads=HEADS, group=GROUP, size=SIZE)
    empty = [list(range(3, 59, 7)), list(range(1, 57, 7))]
    for h, of_head in enumerate(empty):
        k[:, h, of_head] = 0
    full = drive(load("think", percent=0), q, k, v, prompt=PROMPT)
    thin = drive(load("think", percent=13), q, k, v, prompt=PROMPT)  # eight channels
    score = channel_scores(q[PROMPT - 32 : PROMPT], k[:PROMPT].transpose(0, 1), [PROMPT] * 2, None)
    assert [one.topk(8, largest=False).indices.sort().values.tolist() for one in score] == empty
    for a, b in zip(full, thin, strict=True):
        torch.testing.assert_close(a.out, b.out, atol=2e-6, rtol=0)


def test_after_snapkv_only_kept_entries_count() -> None:
    q, k, v = streams(TOKENS, heads=HEADS, group=GROUP, size=SIZE)
    steps = drive(load("think", percent=40, keep=150), q, k, v, prompt=PROMPT)
    plain = drive(load("snapkv", keep=150), q, k, v, prompt=PROMPT)
    for mine, theirs in zip(steps, plain, strict=True):
        assert mine.positions == theirs.positions
        for h in range(HEADS):
            where = mine.positions[h]
            at = torch.tensor([p for p in where if p < PROMPT])
            of_q = q[PROMPT - 32 : PROMPT].pow(2).sum(0).view(HEADS, GROUP, -1).mean(1)[h]
            gone = (of_q * k[at, h].pow(2).sum(0)).topk(25, largest=False).indices
            expected = k[torch.tensor(where), h].clone()
            expected[:64, gone] = 0  # 150 - 32 entries hold one page
            assert torch.equal(mine.k[h], expected)


def test_bytes_are_saved_in_memory_not_on_paper() -> None:
    n, heads, size = 8192, 4, 64
    make = torch.Generator().manual_seed(0)
    k = torch.randn(n, heads, size, generator=make).bfloat16()
    with SequenceStore(layers=1, heads=heads, head_dim=size, dtype=torch.bfloat16, capacity=n) as store:
        store.append(0, k, k, torch.arange(n))
        store.advance(n)
        before = sum(store.bytes().values())
        scores = Scores(
            value=torch.zeros(heads, n),
            protected=torch.zeros(heads, n, dtype=torch.bool),
            lengths=torch.full((heads,), n, dtype=torch.int32),
        )
        seen = Observation(
            layer=0,
            layers=1,
            spec=AttentionSpec(scale=0.125),
            segment=store.decoded(0),
            tokens=n,
            queries=torch.randn(32, heads, size, generator=make),
        )
        everything = Budget(entries=scores.lengths)
        assert kept(scores, everything) is None
        store.apply(0, ThinKeys().plan(seen, scores, everything, None))
        after = sum(store.bytes().values())
    # 25 of 64 key channels go, one is filled up; a page holds the numbers of 39 in a byte each.
    thin, raw = (n - 32) // ENTRIES * ENTRIES, 2 * size * 2
    exact = heads * (thin * 2 * (40 + size) + thin // ENTRIES * 39 + (n - thin) * raw)
    assert exact <= after <= exact + heads * 4 * PAGE
    assert after < 0.82 * before
