"""PBS-Attn against the published algorithm in dense tensors, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.generation.permuted_blocks import PermutedBlocks
from winnow.generation.protocol import PrefillLayer
from winnow.kernels.merge import merge
from winnow.kernels.prefill import prefill
from winnow.types import AttentionSpec, Segment

HEADS, GROUP, SIZE = 2, 2, 16


def tensors(length: int, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(length, HEADS * GROUP, SIZE, generator=make)
    k, v = (torch.randn(HEADS, length, SIZE, generator=make) for _ in range(2))
    return q, k, v


def ours(part, q, k, v, first: int = 0):
    segment = Segment(k=k, v=v, lengths=torch.full((HEADS,), k.shape[1], dtype=torch.int32))
    ctx = PrefillLayer(
        layer=0,
        layers=1,
        q=q[first:],
        query_positions=torch.arange(first, k.shape[1], dtype=torch.int32),
        segments=(segment,),
        spec=AttentionSpec(scale=SIZE**-0.5),
        prompt_end=k.shape[1],
    )
    (pattern,) = part.patterns(ctx, part.state())
    if pattern.form is None:
        return pattern.done
    return prefill(ctx.q, segment, spec=ctx.spec, query_positions=ctx.query_positions, form=pattern.form)


def visible(part, q, k):
    """``[N, T, T]`` bool: keys that each row reads by the paper's algorithm (steps 1 to 7)."""
    T, B, S = q.shape[0], part.block, part.segment
    scale = SIZE**-0.5
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    if T <= S:
        return causal.expand(HEADS * GROUP, -1, -1)
    complete = T // S * S
    mask = torch.zeros(HEADS * GROUP, T, T, dtype=torch.bool)
    for h in range(HEADS):
        rows = range(h * GROUP, (h + 1) * GROUP)
        worth = sum(((q[-B:, n] @ k[h, :complete].T) * scale).softmax(-1).mean(0) for n in rows)
        order = []
        for begin in range(0, complete, S):
            inside = sorted(range(begin, begin + S), key=lambda j: -float(worth[j]))
            order += inside
        order += range(complete, T)
        blocks = [order[at : at + B] for at in range(0, T, B)]
        pooled_k = [k[h, one].sum(0) / B for one in blocks]
        for n in rows:
            for r in range(-(-T // B)):
                query = q[r * B : (r + 1) * B, n].sum(0) / B
                own = r * B // S
                allowed = [c for c in range(len(blocks)) if (c * B) // S < own]
                chosen: set[int] = set()
                if allowed:
                    p = torch.stack([query @ pooled_k[c] * scale for c in allowed]).softmax(0)
                    total = 0.0
                    for i in p.argsort(descending=True).tolist():
                        if total >= part.share and part.share < 1:
                            break
                        chosen.add(allowed[i])
                        total += float(p[i])
                    chosen.add(next(c for c in allowed if 0 in blocks[c]))
                for t in range(r * B, min((r + 1) * B, T)):
                    for c in chosen:
                        mask[n, t, blocks[c]] = True
                    mask[n, t, own * S : t + 1] = True
    return mask


def plain(q, k, v, mask):
    out = []
    for n in range(HEADS * GROUP):
        logits = (q[:, n] @ k[n // GROUP].T) * SIZE**-0.5
        out.append(logits.masked_fill(~mask[n], -torch.inf).softmax(-1) @ v[n // GROUP])
    return torch.stack(out, 1)


@pytest.mark.parametrize("length", [8, 16, 40, 61, 128])
@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_reads_what_the_algorithm_reads(length, share):
    part = PermutedBlocks(block=4, segment=16, share=share)
    q, k, v = tensors(length)
    mask = visible(part, q, k)
    result = ours(part, q, k, v)
    torch.testing.assert_close(result.out, plain(q, k, v, mask), atol=2e-5, rtol=0)
    assert result.pairs == int(mask.sum())


@pytest.mark.parametrize("length", [16, 17, 40, 61, 128])
def test_all_blocks_equal_dense_attention(length):
    q, k, v = tensors(length)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(HEADS * GROUP, -1, -1)
    result = ours(PermutedBlocks(block=4, segment=16, share=1.0), q, k, v)
    torch.testing.assert_close(result.out, plain(q, k, v, causal), atol=2e-5, rtol=0)


@given(st.integers(1, 90), st.integers(0, 89), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_a_call_that_begins_anywhere_reads_all_it_may(length, first, seed):
    first = min(first, length - 1)
    q, k, v = tensors(length, seed)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(HEADS * GROUP, -1, -1)
    result = ours(PermutedBlocks(block=4, segment=8, share=1.0), q, k, v, first)
    torch.testing.assert_close(result.out, plain(q, k, v, causal)[first:], atol=2e-5, rtol=0)


def test_sorting_gathers_what_lies_scattered():
    """Strong keys in every segment: at the same number of blocks, sorted ones hold more attention."""
    length, block, segment = 128, 4, 32
    q, k, _ = tensors(length, 3)
    direction = torch.nn.functional.normalize(
        torch.randn(SIZE, generator=torch.Generator().manual_seed(1)), dim=0
    )
    q = q * 0.2 + 6 * direction
    k[:, 3::16] += 4 * direction
    part = PermutedBlocks(block=block, segment=segment, share=0.5)
    full = torch.stack(
        [((q[-1, n] @ k[n // GROUP].T) * SIZE**-0.5).softmax(-1) for n in range(HEADS * GROUP)]
    )
    sorted_mask = visible(part, q, k)[:, -1]
    in_order = torch.zeros_like(sorted_mask)
    in_order[:, 96:] = True
    for n in range(HEADS * GROUP):
        count = int(sorted_mask[n, :96].sum()) // block
        mass = full[n, :96].view(-1, block).sum(1)
        # Even the best blocks of unsorted keys hold less than the sorted ones that were chosen.
        best = mass.topk(count).indices
        for c in best.tolist():
            in_order[n, c * block : (c + 1) * block] = True
    assert float((full * sorted_mask).sum()) >= float((full * in_order).sum())


def test_two_results_merge_to_one():
    q, k, v = tensors(70)
    result = ours(PermutedBlocks(block=4, segment=16, share=0.5), q, k, v)
    torch.testing.assert_close(merge([result]).out, result.out)
