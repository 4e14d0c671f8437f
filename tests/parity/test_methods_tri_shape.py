"""Tri-shape against PyTorch's attention under the mask that the paper draws."""

from __future__ import annotations

import pytest
import torch

import winnow
from tests.engine.conftest import module, prompt  # noqa: F401 - the fixture
from winnow.generation.protocol import PrefillLayer
from winnow.generation.tri_shape import TriShape
from winnow.kernels.merge import merge
from winnow.kernels.prefill import prefill
from winnow.recipe import Recipe
from winnow.retrieval.radix import Radix
from winnow.types import AttentionSpec, Segment


@pytest.mark.parametrize("first", [0, 30, 60])
@pytest.mark.parametrize(("init", "local", "last"), [(4, 16, 10), (0, 1, 1), (100, 5, 3), (4, 16, 200)])
def test_equals_attention_under_the_drawn_mask(init, local, last, first):
    n, heads, size = 75, 3, 16
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, size) for _ in range(3))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = (j <= i) & ((j < init) | (i - j < local) | (i >= n - last))
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=seen
    ).transpose(0, 1)
    segment = Segment(
        k=k.transpose(0, 1), v=v.transpose(0, 1), lengths=torch.full((heads,), n, dtype=torch.int32)
    )
    spec, positions = AttentionSpec(scale=size**-0.5), torch.arange(first, n, dtype=torch.int32)
    ctx = PrefillLayer(
        layer=0,
        layers=1,
        q=q[first:],
        query_positions=positions,
        segments=(segment,),
        spec=spec,
        prompt_end=n,
    )
    (pattern,) = TriShape(init=init, local=local, last=last).patterns(ctx, None)
    partials = [pattern.done] if pattern.done is not None else []
    if pattern.form is not None:
        partials.append(prefill(q[first:], segment, spec=spec, query_positions=positions, form=pattern.form))
    got = merge(partials)
    torch.testing.assert_close(got.out, want[first:], atol=2e-5, rtol=0)
    assert got.pairs == int(seen[first:].sum()) * heads


def test_a_pool_never_gets_the_tokens_at_a_prompts_end(module):  # noqa: F811
    """They were computed densely; under a longer prompt the window would have computed them."""
    recipe = Recipe(generation=TriShape(init=4, local=24, last=20), retrieval=Radix(page=4))
    text = prompt(120, 1)
    # Chunks of 16: the last 20 tokens do not fit the final one.
    llm = winnow.load(module, recipe=recipe, max_num_batched_tokens=16)
    llm.generate(text[:80], max_new_tokens=2)
    reused = llm.generate(text, max_new_tokens=5, logprobs=0)
    assert reused.stats.tokens_reused == 60
    fresh = winnow.load(module, recipe=recipe, max_num_batched_tokens=16).generate(
        text, max_new_tokens=5, logprobs=0
    )
    for a, b in zip(reused.samples[0].logprobs, fresh.samples[0].logprobs, strict=True):
        assert a["token_id"] == b["token_id"]
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)
