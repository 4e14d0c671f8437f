"""A-shape against PyTorch's attention under a boolean mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from winnow.generation.protocol import PrefillLayer
from winnow.kernels.prefill import prefill
from winnow.methods import load
from winnow.types import AttentionSpec, Segment

HEADS, SIZE = 2, 16


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("stored", "new"), [(100, 100), (100, 31), (1, 1), (64, 1)])
@pytest.mark.parametrize(("init", "local"), [(0, 1), (4, 16), (200, 3), (0, 500), (8, 95)])
def test_equals_attention_under_the_mask(group, stored, new, init, local):
    make = torch.Generator().manual_seed(stored + init)
    q = torch.randn(new, HEADS * group, SIZE, generator=make)
    k, v = (torch.randn(HEADS, stored, SIZE, generator=make) for _ in "kv")
    i, j = torch.arange(stored - new, stored)[:, None], torch.arange(stored)[None]
    mask = (j <= i) & ((j < init) | (i - j < local))
    expected = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.repeat_interleave(group, 0)[None],
        v.repeat_interleave(group, 0)[None],
        attn_mask=mask,
    )[0].transpose(0, 1)

    recipe = load("a-shape", init=init, local=local)
    spec, positions = AttentionSpec(scale=SIZE**-0.5), i.flatten().int()
    segment = Segment(k=k, v=v, lengths=torch.full((HEADS,), stored, dtype=torch.int32))
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
    result = prefill(q, segment, spec=spec, query_positions=positions, form=pattern.form)
    torch.testing.assert_close(result.out, expected, atol=2e-5, rtol=0)
    assert result.pairs == int(mask.sum()) * HEADS * group
