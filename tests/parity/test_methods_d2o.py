"""D2O: budgets by density and merging, against the formulas of the paper in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from tests.parity.one_layer import drive, streams
from winnow.compression.actions.merge_similar import MergeSimilar
from winnow.compression.budgets.density import Density
from winnow.compression.protocol import Setting
from winnow.methods import load
from winnow.types import AttentionSpec, Budget, Observation, Scores, Segment


def layer_scores(value):
    lengths = torch.full((value.shape[0],), value.shape[1], dtype=torch.int32)
    return Scores(value=value, protected=torch.zeros_like(value, dtype=torch.bool), lengths=lengths)


def setting(layers):
    return Setting(layers=range(layers), of=layers, tokens=100)


def test_layers_share_by_density():
    make = torch.Generator().manual_seed(0)
    values = [torch.rand(3, 400, generator=make) ** power for power in (1, 3, 9, 27)]
    rule = Density(keep=50, dense_first=1, dense_last=0)
    budgets = rule.allocate([layer_scores(v) for v in values], setting(4), rule.state())
    weights = []
    for value in values[1:]:
        spread = [float(((row - row.mean()) ** 2).mean()) for row in value]
        low, high = min(spread), max(spread)
        weights.append(math.exp(-sum((x - low) / (high - low) for x in spread) / 3))
    exact = [150 * w / sum(weights) for w in weights]
    assert budgets[0].entries.tolist() == [400] * 3, "an exempt layer keeps everything"
    got = [int(b.entries[0]) for b in budgets[1:]]
    assert sum(got) == 150
    assert all(abs(a - b) < 1 for a, b in zip(got, [1 + (e - 1) for e in exact], strict=True))


def test_equal_densities_share_equally():
    value = torch.rand(2, 90, generator=torch.Generator().manual_seed(1))
    rule = Density(keep=30, dense_first=0, dense_last=0)
    budgets = rule.allocate([layer_scores(value) for _ in range(3)], setting(3), rule.state())
    assert [b.entries.tolist() for b in budgets] == [[30, 30]] * 3


def test_budgets_stay_as_they_were_decided():
    make = torch.Generator().manual_seed(0)
    rule, state = Density(keep=30, dense_first=0, dense_last=0), {}
    first = rule.allocate(
        [layer_scores(torch.rand(2, 90, generator=make)) for _ in range(3)], setting(3), state
    )
    later = rule.allocate(
        [layer_scores(torch.rand(2, 80, generator=make)) for _ in range(3)], setting(3), state
    )
    assert [b.entries.tolist() for b in first] == [b.entries.tolist() for b in later]


def observation(k, v):
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32)
    segment = Segment(k=k, v=v, lengths=lengths)
    return Observation(layer=0, layers=1, spec=AttentionSpec(scale=1.0), segment=segment, tokens=k.shape[1])


def merged(k, v, keep, threshold):
    """One head: groups of dropped entries around the kept ones, weights e^u and e."""
    gone = [i for i in range(len(k)) if i not in keep]
    near = {}
    for e in gone:
        cosines = [float(torch.cosine_similarity(k[e], k[c], dim=0)) for c in keep]
        best = max(range(len(keep)), key=cosines.__getitem__)
        near[e] = (cosines[best], keep[best])
    limit = sum(u for u, _ in near.values()) / len(near) if threshold is None else threshold
    out_k, out_v = k.clone(), v.clone()
    for c in keep:
        group = [(e, u) for e, (u, host) in near.items() if host == c and u >= limit]
        total = math.e + sum(math.exp(u) for _, u in group)
        for x, out in ((k, out_k), (v, out_v)):
            out[c] = (math.e * x[c] + sum(math.exp(u) * x[e] for e, u in group)) / total
    return out_k[keep], out_v[keep]


def test_merging_follows_the_formula():
    make = torch.Generator().manual_seed(4)
    k, v = torch.randn(1, 40, 8, generator=make), torch.randn(1, 40, 8, generator=make)
    value = torch.rand(1, 40, generator=make)
    part, state = MergeSimilar(), {}
    plan = part.plan(
        observation(k, v), layer_scores(value), Budget(entries=torch.tensor([12], dtype=torch.int32)), state
    )
    keep = sorted(value[0].topk(12).indices.tolist())
    assert plan.keep[0].tolist() == keep
    k_new, v_new = merged(k[0], v[0], keep, None)
    change = plan.rewrite[0]
    at = [keep.index(i) for i in change.entries.tolist()]
    untouched = [i for i in range(12) if i not in at]
    torch.testing.assert_close(change.k, k_new[at], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(change.v, v_new[at], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(k[0][[keep[i] for i in untouched]], k_new[untouched])


def test_the_threshold_moves():
    part, state = MergeSimilar(smooth=0.5), {}
    means = []
    for seed in range(3):
        make = torch.Generator().manual_seed(seed)
        k = torch.randn(1, 30, 8, generator=make)
        value = torch.rand(1, 30, generator=make)
        part.plan(
            observation(k, k),
            layer_scores(value),
            Budget(entries=torch.tensor([9], dtype=torch.int32)),
            state,
        )
        keep = sorted(value[0].topk(9).indices.tolist())
        unit = torch.nn.functional.normalize(k[0], dim=-1)
        gone = [i for i in range(30) if i not in keep]
        means.append(float((unit[gone] @ unit[keep].T).max(1).values.mean()))
        expected = means[0]
        for mean in means[1:]:
            expected = 0.5 * expected + 0.5 * mean
        assert state[0] == pytest.approx(expected, rel=1e-5)


def test_an_exact_duplicate_changes_nothing():
    k, v = torch.randn(1, 8, 8), torch.randn(1, 8, 8)
    k[0, 7], v[0, 7] = k[0, 2], v[0, 2]
    value = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    plan = MergeSimilar().plan(
        observation(k, v), layer_scores(value), Budget(entries=torch.tensor([7], dtype=torch.int32)), {}
    )
    (change,) = plan.rewrite
    assert change.entries.tolist() == [2]
    torch.testing.assert_close(change.k[0], k[0, 2])
    torch.testing.assert_close(change.v[0], v[0, 2])


def test_values_alone():
    make = torch.Generator().manual_seed(4)
    k, v = torch.randn(1, 40, 8, generator=make), torch.randn(1, 40, 8, generator=make)
    budget = Budget(entries=torch.tensor([12], dtype=torch.int32))
    plan = MergeSimilar(keys=False).plan(observation(k, v), layer_scores(torch.rand(1, 40)), budget, {})
    change = plan.rewrite[0]
    assert torch.equal(change.k, k[0, change.entries])


def test_keeps_what_h2o_keeps():
    """Where every layer's share is the same, the two differ in what becomes of the rest only."""
    q, k, v = streams(90)
    merging = drive(
        load("d2o", heavy=12, recent=8, every=4, sinks=0, dense_first=0, dense_last=0), q, k, v, prompt=50
    )
    dropping = drive(load("h2o", heavy=12, recent=8, every=4), q, k, v, prompt=50)
    assert merging[0].positions == dropping[0].positions
    assert not torch.equal(merging[0].v[0], dropping[0].v[0]), "something was merged"
    ours = merging[0].positions[0]
    k_new, v_new = merged(k[:50, 0], v[:50, 0], ours, None)
    del k_new
    moved = (v_new - merging[0].v[0]).abs().amax(1) < 1e-5
    assert float(moved.float().mean()) > 0.5, (
        "one threshold over all heads, so groups differ at the edge only"
    )
