"""SnapKV against the paper's formula on the full attention matrix, in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from winnow.compression.protocol import Setting
from winnow.methods import load
from winnow.types import AttentionSpec, Observation, Segment

HEADS, SIZE = 2, 16


def layer(length: int, group: int, seed: int, dtype: torch.dtype = torch.float32):
    make = torch.Generator().manual_seed(seed)
    q = (2 * torch.randn(length, HEADS * group, SIZE, generator=make)).to(dtype)
    k, v = (torch.randn(HEADS, length, SIZE, generator=make).to(dtype) for _ in "kv")
    return q, k, v


def planned(recipe, q, k, v):
    """What the recipe keeps, as the engine asks it."""
    length, window = q.shape[0], recipe.needs.window_queries
    compress = recipe.compression
    seen = Observation(
        layer=0,
        layers=1,
        tokens=k.shape[1],
        spec=AttentionSpec(scale=SIZE**-0.5),
        segment=Segment(k=k, v=v, lengths=torch.full((HEADS,), length, dtype=torch.int32)),
        queries=q[-window:],
        query_positions=torch.arange(max(0, length - window), length, dtype=torch.int32),
    )
    scores = compress.score.score(seen, None)
    (budget,) = compress.budget.allocate([scores], Setting(layers=[0], of=1, tokens=length), None)
    return compress.act.plan(seen, scores, budget, None).keep


def full_attention(q, k):
    """``A[n, i, j]``, the whole causal matrix, query heads sharing a KV head by repetition."""
    length, heads = q.shape[:2]
    repeated = k.repeat_interleave(heads // HEADS, 0).double()
    logits = torch.einsum("ind,njd->nij", q.double(), repeated) / math.sqrt(SIZE)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1)


def by_the_paper(q, k, *, keep, window, kernel, pooling):
    """Per KV head the kept entries: vote, pool, mean over the group, top-k, window appended."""
    length, heads = q.shape[:2]
    if length <= keep:
        return None
    votes = full_attention(q, k)[:, length - window :, : length - window].sum(1)
    pooled = torch.zeros_like(votes)
    side = kernel // 2
    for j in range(votes.shape[1]):
        near = votes[:, max(0, j - side) : j + side + 1]
        pooled[:, j] = near.amax(1) if pooling == "max" else near.mean(1)
    per_kv_head = pooled.view(HEADS, heads // HEADS, -1).mean(1)
    out = []
    for row in per_kv_head:
        best = sorted(range(row.numel()), key=lambda j: (-float(row[j]), -j))[: keep - window]
        out.append(sorted(best) + list(range(length - window, length)))
    return out


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize(
    ("length", "keep", "window", "kernel"), [(97, 40, 8, 5), (200, 33, 32, 7), (60, 20, 1, 1)]
)
def test_kept_entries_are_those_of_the_formula(group, pooling, length, keep, window, kernel):
    q, k, v = layer(length, group, seed=length + group)
    recipe = load("snapkv", keep=keep, window=window, kernel=kernel, pooling=pooling)
    expected = by_the_paper(q, k, keep=keep, window=window, kernel=kernel, pooling=pooling)
    got = [one.tolist() for one in planned(recipe, q, k, v)]
    if pooling == "avg" or kernel == 1:
        assert got == expected
        return
    # Maximum pooling makes plateaus: equal votes, which float32 and float64 order alike only up to
    # rounding of the mean. Compare what was kept by its votes.
    votes = full_attention(q, k)[:, length - window :, : length - window].sum(1)
    side = kernel // 2
    pooled = torch.stack(
        [votes[:, max(0, j - side) : j + side + 1].amax(1) for j in range(length - window)], 1
    )
    value = pooled.view(HEADS, group, -1).mean(1)
    for h in range(HEADS):
        mine, theirs = (value[h, one[: keep - window]].sort().values for one in (got[h], expected[h]))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        assert got[h][-window:] == expected[h][-window:]


def test_a_prompt_within_the_budget_is_left_alone():
    q, k, v = layer(40, 2, seed=3)
    assert planned(load("snapkv", keep=40, window=8), q, k, v) is None


@pytest.mark.parametrize("place", [0, 1, 77, 150, 191])
def test_a_planted_key_is_kept_in_every_head(place):
    q, k, v = layer(200, 4, seed=5)
    common = torch.randn(SIZE, generator=torch.Generator().manual_seed(6))
    q[-8:] = common + 0.1 * q[-8:]
    k[:, place] = 10 * q[-8:].mean((0, 1))
    for one in planned(load("snapkv", keep=12, window=8, kernel=1), q, k, v):
        assert place in one.tolist()


def test_one_query_and_no_pooling_rank_its_attention_row():
    q, k, v = layer(120, 1, seed=7)
    row = full_attention(q, k)[:, -1, :-1]
    for h, one in enumerate(planned(load("snapkv", keep=21, window=1, kernel=1), q, k, v)):
        assert set(one[:-1].tolist()) == set(row[h].topk(20).indices.tolist())
        assert one[-1] == 119


def test_average_pooling_does_not_damp_the_borders():
    """The official code divides by the kernel's size where it hangs over the border."""
    q, k, v = layer(100, 1, seed=8)
    k[:] = 0.0  # every visible entry gets the same vote
    seen = Observation(
        layer=0,
        layers=1,
        tokens=k.shape[1],
        spec=AttentionSpec(scale=1.0),
        segment=Segment(k=k, v=v, lengths=torch.full((HEADS,), 100, dtype=torch.int32)),
        queries=q[-8:],
        query_positions=torch.arange(92, 100, dtype=torch.int32),
    )
    value = load("snapkv", keep=50, window=8, kernel=5).compression.score.score(seen, None).value
    assert value[:, 0].tolist() == pytest.approx(value[:, 40].tolist())


def test_bfloat16_votes_are_summed_in_float32():
    q, k, v = layer(150, 2, seed=9, dtype=torch.bfloat16)
    expected = by_the_paper(q, k, keep=40, window=8, kernel=5, pooling="avg")
    got = [one.tolist() for one in planned(load("snapkv", keep=40, window=8), q, k, v)]
    assert got == expected
