"""Mustafar: what stays of every vector, its bytes, and attention over it, by the rule in plain Python."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import winnow
from tests.parity.one_layer import drive, streams
from winnow.methods import load
from winnow.store.codecs import bytes_per_entry, codec_named


def pruned(x: torch.Tensor, percent: int) -> torch.Tensor:
    """Every vector without its ``floor(D * percent / 100)`` smallest magnitudes; of ties the later go."""
    out = x.clone()
    size = x.shape[-1]
    gone = size * percent // 100
    for row in out.view(-1, size):
        magnitudes = row.abs().tolist()
        order = sorted(range(size), key=lambda d: (magnitudes[d], -d))
        row[order[:gone]] = 0.0
    return out


@pytest.mark.parametrize("percent", [0, 50, 70])
def test_what_stays_is_what_the_rule_keeps(percent):
    q, k, v = streams(200, size=32)
    step = drive(load("mustafar", percent=percent, recent=32), q, k, v, prompt=180)[0]
    for h in range(2):
        assert step.positions[h] == list(range(180)), "no token is dropped"
        # 180 less 32 are 148: two whole pages of 64.
        torch.testing.assert_close(step.k[h][:128], pruned(k[:128, h], percent), atol=0, rtol=0)
        torch.testing.assert_close(step.v[h][:128], pruned(v[:128, h], percent), atol=0, rtol=0)
        assert torch.equal(step.k[h][128:], k[128:180, h])


def test_pages_are_packed_as_decoding_goes_on():
    q, k, v = streams(420, size=32)
    steps = drive(load("mustafar", percent=50, recent=32, every=64), q, k, v, prompt=100)
    last = steps[-1]
    whole = (420 - 32) // 64 * 64
    packed = int((last.k[0][:, :] == 0).sum(1).ge(16).sum())
    assert packed <= whole
    assert packed >= whole - 64, "at most one action is still to come"


def test_bytes_by_hand():
    assert bytes_per_entry(codec_named("mustafar:50"), 64, torch.bfloat16) == 2 * (32 * 2 + 8)
    assert bytes_per_entry(codec_named("mustafar:70"), 128, torch.bfloat16) == 2 * (39 * 2 + 16)
    assert bytes_per_entry(codec_named("mustafar:0"), 64, torch.bfloat16) == 2 * (64 * 2 + 8)


def test_decoding_reads_and_stores_the_packed_form():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    prompt = torch.randint(128, (2080,), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"max_new_tokens": 4, "ignore_eos": True}
    full = winnow.load(model).generate(prompt, **options).stats
    sparse = winnow.load(model, recipe=load("mustafar", percent=70)).generate(prompt, **options).stats
    whole, packed = 2 * 64 * 2, 2 * (20 * 2 + 8)
    assert set(sparse.bytes_read) == {"host/mustafar:70", "host/raw"}
    assert sparse.bytes_read["host/mustafar:70"] == 3 * 2 * 2 * 2048 * packed
    assert sum(sparse.bytes_read.values()) < 0.45 * sum(full.bytes_read.values())
    assert sum(sparse.bytes_stored.values()) < 0.45 * sum(full.bytes_stored.values())
    assert packed / whole == pytest.approx(0.375)


def test_nothing_left_out_changes_nothing():
    k = torch.randn(64, 64)
    codec = codec_named("mustafar:0")
    back = codec.decode(codec.encode(k, -k), torch.float32)
    assert torch.equal(back[0], k)
    assert torch.equal(back[1], -k)
    with pytest.raises(ValueError, match="leaves nothing"):
        codec_named("mustafar:100")
