"""CacheBlend equals its formulas, written out on the model's own weights in plain PyTorch.

Independent of the engine, the store and the walk: as the research code does it, keys are kept before
rotation and turned by the model's own function at their new positions. Only its mask is not copied: a row
sees what stands at or before its own position.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import winnow
from tests.parity.families import VOCAB, make
from winnow.engine.repair import Division
from winnow.engine.request import SamplingParams
from winnow.methods import load

BEGIN = 1


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def project(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[heads, N, D]`` queries, keys and values before any rotation."""
    normed, attention = block.input_layernorm(hidden), block.self_attn
    return tuple(
        matrix(normed).view(len(hidden), -1, attention.head_dim).transpose(0, 1)
        for matrix in (attention.q_proj, attention.k_proj, attention.v_proj)
    )


def turned(model: Any, x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = model.model.rotary_emb(x, positions[None])
    return apply_rotary_pos_emb(x[None], x[None], cos, sin)[0][0]


def rest(block: Any, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    """Attention of rows at positions ``at`` over all keys, and the MLP."""
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    seen = torch.arange(k.shape[1])[None] <= at[:, None]
    logits = (q @ k.transpose(1, 2) * block.self_attn.scaling).masked_fill(~seen, -torch.inf)
    out = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    hidden = hidden + block.self_attn.o_proj(out)
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def apart(model: Any, chunk: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys before rotation and values of a chunk that is prefilled behind the begin token alone."""
    tokens = torch.tensor([BEGIN, *chunk])
    at, hidden, found = torch.arange(len(tokens)), model.model.embed_tokens(tokens), []
    for block in model.model.layers:
        q, k, v = project(block, hidden)
        found.append((k[:, 1:], v[:, 1:]))
        hidden = rest(block, hidden, turned(model, q, at), turned(model, k, at), v, at)
    return found


@torch.inference_mode()
def blended(
    model: Any, chunks: list[list[int]], suffix: list[int], shares: tuple[int, ...], sides: str
) -> Tensor:
    """``[V]`` logits of the last token. The first chunk, which is exact, is always among the rows."""
    tokens = torch.tensor([t for chunk in [*chunks, suffix] for t in chunk])
    lead, region = len(chunks[0]), sum(map(len, chunks[1:]))
    old = [torch.zeros(0)] * len(model.model.layers)
    stored = [apart(model, chunk) for chunk in chunks[1:]]
    old = [
        tuple(torch.cat([one[layer][i] for one in stored], 1) for i in (0, 1))
        for layer in range(len(model.model.layers))
    ]
    rows, hidden = torch.arange(len(tokens)), model.model.embed_tokens(tokens)
    for number, block in enumerate(model.model.layers):
        q, k, v = project(block, hidden)
        q, k = turned(model, q, rows), turned(model, k, rows)
        middle = torch.arange(lead, lead + region)
        whole_k = torch.zeros(len(k), len(tokens), k.shape[2])
        whole_v = torch.zeros_like(whole_k)
        whole_k[:, middle] = old_k = turned(model, old[number][0], middle)
        whole_v[:, middle] = old_v = old[number][1]
        whole_k[:, rows], whole_v[:, rows] = k, v
        if 1 <= number <= len(shares):
            inside = (rows >= lead) & (rows < lead + region)
            at = rows[inside] - lead
            gap = torch.zeros(len(at))
            if sides != "values":
                gap += (k[:, inside] - old_k[:, at]).square().sum((0, 2))
            if sides != "keys":
                gap += (v[:, inside] - old_v[:, at]).square().sum((0, 2))
            chosen = at[gap.topk(region * shares[number - 1] // 100).indices] + lead
            keep = ~inside | torch.isin(rows, chosen)
            rows, hidden, q = rows[keep], hidden[keep], q[:, keep]
        hidden = rest(block, hidden, q, whole_k, whole_v, rows)
    return model.lm_head(model.model.norm(hidden[-1]))


@pytest.mark.parametrize("sides", ["keys-and-values", "values", "keys"])
@pytest.mark.parametrize("shares", [(15,), (50,), (60, 40, 10)])
@pytest.mark.parametrize("family", ["llama", "yarn", "llama3-rope"])
@pytest.mark.parametrize("runner", ["fused", "general"])
def test_equals_the_formulas(runner: str, family: str, shares: tuple[int, ...], sides: str) -> None:
    model = make(family)
    chunks, suffix = [[BEGIN, *ids(20, 1)], ids(33, 2), ids(28, 3), ids(40, 4)], ids(6, 5)
    want = blended(model, chunks, suffix, shares, sides).log_softmax(-1)
    llm = winnow.load(model, recipe=load("cacheblend", recompute=shares, deviation=sides), runner=runner)
    params = SamplingParams(max_new_tokens=1, ignore_eos=True, logprobs=VOCAB)
    division = Division(lengths=tuple(map(len, chunks)), begin=(BEGIN,))
    for _ in range(2):  # with an empty pool, and with a full one
        tokens = [t for chunk in [*chunks, suffix] for t in chunk]
        result = llm.engine.submit(tokens, params, division=division)
        for _ in llm.engine.events():
            pass
        got = torch.empty(VOCAB)
        for token, value in result.samples[0].logprobs[0]["top"]:
            got[token] = value
        torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
    assert result.stats.tokens_approximate == 101
    # The formulas are not full prefill in disguise.
    full = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    assert (full - want).abs().max() > 1e-2
