"""The file written for llama.cpp holds the same model: its logits are those of `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from winnow.bench.llama_cpp import available, write_gguf

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.skipif(bool(available()), reason=available() or "llama.cpp is there")
@pytest.mark.parametrize("rope", ROPES)
def test_logits_are_those_of_transformers(tmp_path: Path, rope: str) -> None:
    import llama_cpp

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters=ROPES[rope],
    )
    model = hf.LlamaForCausalLM(config).to(torch.bfloat16).float().eval()
    write_gguf(model, tmp_path / "model.gguf")
    peer = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=512, logits_all=True, verbose=False, n_threads=1
    )
    ids = torch.randint(0, 128, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    peer.eval(ids)
    got = torch.tensor(peer.scores[: len(ids)].copy())
    with torch.inference_mode():
        want = model(torch.tensor([ids])).logits[0]
    # Its cache holds half-precision numbers; without the factors of llama3 this is off by a tenth.
    assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < 0.01
