"""Models with random weights, for timing: their text is noise, their arithmetic is real."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["PRESETS", "random_model"]

_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}

# The shape of Llama 3.2 1B, its attention with next to no other weights, and something that runs in a test.
PRESETS: dict[str, dict[str, Any]] = {
    "1b": _1B,
    "1b-attention": _1B | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}

# Signs, mantissas and the lowest bit of the exponent are random, the rest of the exponent is that of
# 2^-7: magnitudes from 2^-7 to 2^-5, a standard deviation of 0.019.
_RANDOM_BITS, _EXPONENT_BITS = -32513, 120 << 7  # 0x80ff as int16


def random_model(
    preset: str = "1b", *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> LlamaForCausalLM:
    """A Llama with random weights, made in its dtype without a copy.

    Parameters
    ----------
    preset : {"1b", "1b-attention", "tiny"}
        ``1b``: 16 layers, hidden 2048, 32 query and 8 KV heads of 64, 1.24 billion weights;
        ``1b-attention``: the same layers and heads around a hidden size of 64.
    seed : int
        Equal seeds give equal weights.
    dtype : torch.dtype

    Returns
    -------
    transformers.LlamaForCausalLM
        In evaluation mode, on the CPU. Generation does not end by itself: it has no end token.

    Raises
    ------
    ValueError
        If there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    config = LlamaConfig(**PRESETS[preset], bos_token_id=None, eos_token_id=None, dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rotary = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    model = model.to(dtype).to_empty(device="cpu")
    model.model.rotary_emb = rotary
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                _fill(parameter.data, generator)
    model.generation_config.eos_token_id = None
    return model.eval()


def _fill(weight: Tensor, generator: torch.Generator) -> None:
    """Four bfloat16 from each random word: a normal distribution would take ten times as long."""
    for row in torch.split(weight.flatten(), 1 << 24):
        words = torch.empty(-(-len(row) // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        bits = words.view(torch.int16).bitwise_and_(_RANDOM_BITS).bitwise_or_(_EXPONENT_BITS)
        row.copy_(bits.view(torch.bfloat16)[: len(row)])
