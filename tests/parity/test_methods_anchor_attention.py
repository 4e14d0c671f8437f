"""AnchorAttention against a dense masked softmax whose mask a slow literal loop computes."""

from __future__ import annotations

import math

import pytest
import torch

from winnow.generation.protocol import PrefillLayer
from winnow.kernels.merge import merge
from winnow.kernels.prefill import prefill
from winnow.methods import load
from winnow.types import AttentionSpec, Segment

HEADS, SIZE = 2, 16


def layer(length: int, group: int, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(length, HEADS * group, SIZE, generator=make)
    k, v = (torch.randn(HEADS, length, SIZE, generator=make) for _ in "kv")
    k[:, :2] *= 2.5  # something like a sink, so that anchors lie above most columns
    return q, k, v


def literal_mask(q, k, *, theta, block, step, init):
    """``[H * G, T, T]`` bool, entry by entry from the definition."""
    length, heads = q.shape[:2]
    rows = block * step
    mask = torch.zeros(heads, length, length, dtype=torch.bool)
    for n in range(heads):
        keys = k[n // (heads // HEADS)]
        logits = q[:, n] @ keys.T / math.sqrt(SIZE)
        for i in range(length):
            for j in range(i + 1):
                mask[n, i, j] = j < init or j >= i // rows * rows
        anchors = logits.masked_fill(~mask[n], -math.inf).amax(-1)
        for first in range(0, length, rows):
            last = min(first + rows, length)
            for j in range(init, first):
                for a in range(first, last, block):
                    b = min(a + block, last)
                    mean = q[a:b, n].mean(0) @ keys[j] / math.sqrt(SIZE)
                    if mean + theta >= anchors[a:b].mean():
                        mask[n, first:last, j] = True
    return mask


def dense_under(mask, q, k, v):
    group = q.shape[1] // HEADS
    logits = torch.einsum("ind,njd->nij", q, k.repeat_interleave(group, 0)) / math.sqrt(SIZE)
    probs = logits.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("nij,njd->ind", probs, v.repeat_interleave(group, 0))


def run(recipe, q, k, v):
    length = q.shape[0]
    spec, positions = AttentionSpec(scale=SIZE**-0.5), torch.arange(length, dtype=torch.int32)
    segment = Segment(k=k, v=v, lengths=torch.full((HEADS,), length, dtype=torch.int32))
    ctx = PrefillLayer(
        layer=0,
        layers=1,
        q=q,
        query_positions=positions,
        segments=(segment,),
        spec=spec,
        prompt_end=int(positions[-1]) + 1,
    )
    (pattern,) = recipe.generation.patterns(ctx, recipe.generation.state())
    parts = [pattern.done]
    if pattern.form is not None:
        parts.append(prefill(q, segment, spec=spec, query_positions=positions, form=pattern.form))
    return merge(parts)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("theta", [-math.inf, 0.0, 1.5, math.inf])
@pytest.mark.parametrize("length", [1, 23, 24, 25, 100])
def test_equals_the_literal_mask(group, theta, length):
    q, k, v = layer(length, group, seed=length)
    shape = {"theta": theta, "block": 4, "step": 3, "init": 2}
    mask = literal_mask(q, k, **shape)
    result = run(load("anchor-attention", **shape), q, k, v)
    torch.testing.assert_close(result.out, dense_under(mask, q, k, v), atol=2e-5, rtol=0)
    assert result.pairs == int(mask.sum())


def test_infinite_theta_is_dense_and_counts_nothing_twice():
    q, k, v = layer(100, 3)
    result = run(load("anchor-attention", theta=math.inf, block=4, step=3, init=2), q, k, v)
    causal = torch.ones(6, 100, 100, dtype=torch.bool).tril()
    torch.testing.assert_close(result.out, dense_under(causal, q, k, v), atol=2e-5, rtol=0)
    assert result.pairs == int(causal.sum())


def test_what_is_read_grows_with_theta():
    q, k, v = layer(100, 3)
    thetas = (-math.inf, -1.0, 0.0, 1.0, 2.0, 4.0, math.inf)
    pairs = [run(load("anchor-attention", theta=t, block=4, step=3, init=2), q, k, v).pairs for t in thetas]
    assert pairs == sorted(pairs)
    assert len(set(pairs)) >= 5


def test_identical_queries_in_a_tile_lose_no_column_within_theta():
    q, k, v = layer(96, 1)
    q = q[::4].repeat_interleave(4, 0).contiguous()
    theta, rows = 2.0, 12
    part = load("anchor-attention", theta=theta, block=4, step=3, init=2).generation
    segment = Segment(k=k, v=v, lengths=torch.full((HEADS,), 96, dtype=torch.int32))
    positions = torch.arange(96, dtype=torch.int32)
    ctx = PrefillLayer(
        layer=0,
        layers=1,
        q=q,
        query_positions=positions,
        segments=(segment,),
        spec=AttentionSpec(scale=SIZE**-0.5),
        prompt_end=96,
    )
    form = part.patterns(ctx, part.state())[0].form
    near = 0
    for n in range(HEADS):
        logits = (q[:, n] @ k[n].T / math.sqrt(SIZE)).masked_fill(positions[:, None] < positions, -math.inf)
        # A tile's last query has its highest anchor, so its recall is 1 by the definition.
        for i in range(3, 96, 4):
            a, b = form.offsets[n, i // rows : i // rows + 2].tolist()
            listed = set(form.columns[a:b].tolist())
            within = (logits[i] >= logits[i].max() - theta).nonzero().flatten().tolist()
            wanted = {j for j in within if 2 <= j < i // rows * rows}
            near += len(wanted)
            assert wanted <= listed
    assert near > 50
