"""RazorAttention: its head search against whole matrices, its compensation entry against the formula."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import winnow
from tests.parity.one_layer import drive, streams
from winnow.compression.actions.compensate import Compensate
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.profiles import load_profile, save_profile
from winnow.recipe import Recipe
from winnow.tune.retrieval_heads import retrieval_heads

GROUP = 2


def windowed(keep: int, sinks: int = 2, every: int = 5) -> Recipe:
    """Every head as one that does not retrieve."""
    compress = Compress(
        score=Recency(sinks=sinks), budget=Uniform(keep=keep), act=Compensate(), turns="every", every=every
    )
    return Recipe(compression=compress)


def published(q, k, v, t, sinks, window):
    """Equation 5 with the dropped set and its means over whole tensors."""
    kept = [*range(sinks), *range(t + 1 - window, t + 1)]
    gone = [j for j in range(t + 1) if j not in kept]
    out = []
    for n in range(q.shape[1]):
        h, scale = n // GROUP, q.shape[-1] ** -0.5
        weights = torch.exp(k[kept, h] @ q[t, n] * scale)
        total, value = weights.sum(), weights @ v[kept, h]
        if gone:
            weight = len(gone) * torch.exp(k[gone, h].mean(0) @ q[t, n] * scale)
            total, value = total + weight, value + weight * v[gone, h].mean(0)
        out.append(value / total)
    return torch.stack(out)


def test_output_is_the_formula_at_every_cut():
    q, k, v = streams(90)
    sinks, keep, every = 2, 30, 5
    steps = drive(windowed(keep, sinks, every), q, k, v, prompt=50)
    checked = 0
    for number, step in enumerate(steps[1:], 1):
        t = 49 + number
        if (t - 50) % every:
            continue  # the first step after a cut: its window is the budget's and this token
        expected = published(q, k, v, t, sinks, keep - sinks - 1 + 1)
        torch.testing.assert_close(step.out, expected, atol=1e-4, rtol=0)
        checked += 1
    assert checked == 8


def test_equal_dropped_entries_are_represented_exactly():
    q, k, v = streams(80)
    k[2:60], v[2:60] = k[2].clone(), v[2].clone()
    steps = drive(windowed(20, sinks=2, every=1), q, k, v, prompt=70)
    full = drive(windowed(10_000, sinks=2), q, k, v, prompt=70)
    torch.testing.assert_close(steps[1].out, full[1].out, atol=1e-4, rtol=0)


def test_without_its_weight_the_entry_is_not_enough():
    q, k, v = streams(80)
    k[2:60], v[2:60] = k[2].clone(), v[2].clone()
    step = drive(windowed(20, sinks=2, every=1), q, k, v, prompt=70)[0]
    bias = step.bias[0]
    (slot,) = bias.nonzero().flatten().tolist()
    assert float(bias[slot]) == pytest.approx(math.log(70 - 19))
    weighted = torch.softmax(step.k[0] @ q[70, 0] * 0.25 + bias, 0) @ step.v[0]
    without = torch.softmax(step.k[0] @ q[70, 0] * 0.25, 0) @ step.v[0]
    exact = torch.softmax(k[:70, 0] @ q[70, 0] * 0.25, 0) @ v[:70, 0]
    assert float((weighted - exact).norm()) < 0.1 * float((without - exact).norm())


def test_the_running_mean_is_the_mean():
    q, k, v = streams(100)
    step = drive(windowed(20, sinks=2, every=3), q, k, v, prompt=40)[-1]
    for h in range(2):
        (slot,) = step.bias[h].nonzero().flatten().tolist()
        count = round(math.exp(float(step.bias[h][slot])))
        gone = range(2, 2 + count)
        torch.testing.assert_close(step.k[h][slot], k[list(gone), h].mean(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(step.v[h][slot], v[list(gone), h].mean(0), atol=1e-5, rtol=0)
        assert count + len(step.positions[h]) - 1 == 100


# ---------------------------------------------------------------------------------- the search


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=5,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_scores_equal_those_of_whole_matrices(model):
    ours = winnow.load(model, runner="general").engine.model
    profile = retrieval_heads(ours, tokens=30, repeats=3, seed=4)
    dice = torch.Generator().manual_seed(4)
    usual = torch.tensor([i for i in range(97) if i != 5])
    text = usual[torch.randint(96, (30,), generator=dice)].repeat(3)
    reference = LlamaForCausalLM(model.config)
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = reference.eval()(text[None], output_attentions=True, use_cache=False).attentions
    for name, ahead in (("echo", 0), ("induction", 1)):
        for layer, matrix in enumerate(attentions):
            per_head = []
            for n in range(4):
                pairs = [float(matrix[0, n, i, j + ahead]) for i in range(90) for j in range(i - 30, -1, -30)]
                per_head.append(sum(pairs) / len(pairs))
            expected = [max(per_head[2 * h], per_head[2 * h + 1]) for h in range(2)]
            assert profile.tensors[name][layer].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_profile_survives_its_file_and_knows_its_model(model, tmp_path):
    ours = winnow.load(model).engine.model
    profile = retrieval_heads(ours, tokens=20, repeats=2)
    path = tmp_path / "heads.safetensors"
    save_profile(profile, path)
    back = load_profile(path, model=ours.fingerprint)
    assert torch.equal(back.tensors["echo"], profile.tensors["echo"])
    with pytest.raises(ValueError, match="another model"):
        load_profile(path, model="something else")
    save_profile(dataclasses.replace(profile, kind="something"), path)
    llm = winnow.load(model, recipe=winnow.methods.load("razor-attention", profile=str(path), buffer=8))
    with pytest.raises(ValueError, match="winnow profile retrieval-heads"):
        llm.generate(list(range(6, 40)), max_new_tokens=1)
    with pytest.raises(ValueError, match="make one"):
        winnow.load(model, recipe="razor-attention")


def test_the_search_finds_the_heads_that_were_built_to_retrieve():
    """The embedded model's layers 1 to 5 hold its retrieval heads; layer 0 holds none."""
    ours = winnow.load("embedded").engine.model
    profile = retrieval_heads(ours, tokens=200, repeats=3)
    induction = profile.tensors["induction"]
    best = induction.flatten().topk(3).indices
    assert all(int(at) // ours.kv_heads >= 1 for at in best)
    assert float(induction.max()) > 0.2
    assert float(induction[0].max()) < 0.05
