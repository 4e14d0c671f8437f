"""Tiny random models of every family that parity is claimed for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

WINDOW = 8
VOCAB = 97

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_HEAD = {"head_dim": 16}  # not hidden_size / heads, so that a derived size would show
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_SIZES, **_HEAD),
    "llama3-rope": lambda: hf.LlamaConfig(
        **_SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": lambda: hf.LlamaConfig(
        **_SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "linear-rope": lambda: hf.LlamaConfig(
        **_SIZES,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "qwen2": lambda: hf.Qwen2Config(**_SIZES),
    "qwen2-window": lambda: hf.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": lambda: hf.Qwen3Config(**_SIZES, **_HEAD),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        **_SIZES, **_HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "mistral": lambda: hf.MistralConfig(**_SIZES, **_HEAD, sliding_window=WINDOW),
    "mixtral": lambda: hf.MixtralConfig(
        **_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "phi3": lambda: hf.Phi3Config(**_SIZES, sliding_window=WINDOW),
    # Both stay in their first regime: see winnow.models.rotary.position_limit.
    "dynamic-rope": lambda: hf.LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "phi3-longrope": lambda: hf.Phi3Config(
        **_SIZES,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [2.0, 4.0, 6.0, 8.0],
            "original_max_position_embeddings": 64,
        },
    ),
    "gemma2": lambda: hf.Gemma2Config(
        **_SIZES,
        **_HEAD,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_SIZES,
        **_HEAD,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "olmo2": lambda: hf.Olmo2Config(**_SIZES),
    "glm4": lambda: hf.Glm4Config(**_SIZES, **_HEAD, partial_rotary_factor=0.5),
    "smollm3": lambda: hf.SmolLM3Config(
        **_SIZES,
        no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=_MIXED,
    ),
    "granite": lambda: hf.GraniteConfig(
        **_SIZES,
        attention_multiplier=0.2,
        logits_scaling=3.0,
        residual_multiplier=0.5,
        embedding_multiplier=2.0,
    ),
    "cohere2": lambda: hf.Cohere2Config(
        **_SIZES, **_HEAD, sliding_window=WINDOW, layer_types=_MIXED, logit_scale=0.25
    ),
    "gpt-oss": lambda: hf.GptOssConfig(
        **_SIZES,
        **_HEAD,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "olmo3": lambda: hf.Olmo3Config(**_SIZES, sliding_window=WINDOW, layer_types=_MIXED),
    "exaone4": lambda: hf.Exaone4Config(**_SIZES, sliding_window=WINDOW, layer_types=_MIXED),
    "starcoder2": lambda: hf.Starcoder2Config(**_SIZES, sliding_window=WINDOW),
    # These two do not pass keywords of forward down to their layers.
    "stablelm": lambda: hf.StableLmConfig(**_SIZES),
    "nemotron": lambda: hf.NemotronConfig(**_SIZES),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
    "phi": lambda: hf.PhiConfig(**_SIZES),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=48,
        n_layer=3,
        n_head=6,
        n_positions=256,
        scale_attn_by_inverse_layer_idx=True,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=None,
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=56,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=256,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    ),
}


def make(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    """A model whose random weights are large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            else:
                inner = weight.shape[-1] if isinstance(_owner(model, name), nn.Linear) else weight.shape[-2]
                weight.copy_(torch.randn_like(weight) * 1.5 / max(inner, 16) ** 0.5)
    return model.to(dtype)


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])
