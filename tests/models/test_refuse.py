"""Models that cannot run are refused by name, with a reason, in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf

from winnow.models.hf import HFModel
from winnow.models.interface import NAME
from winnow.models.refuse import check_config

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MHA = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}

# Refused by their configuration: no weights are needed to say so.
BY_CONFIG: dict[str, tuple[Callable[[], hf.PreTrainedConfig], str]] = {
    "deepseek_v2": (lambda: hf.DeepseekV2Config(**_SIZES), "latent attention"),
    "deepseek_v3": (lambda: hf.DeepseekV3Config(**_SIZES), "latent attention"),
    "minicpm3": (lambda: hf.MiniCPM3Config(**_SIZES), "latent attention"),
    "jamba": (lambda: hf.JambaConfig(**_SIZES), "linear_attention"),
    "mamba": (lambda: hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "linear_attention"),
    "qwen3_next": (lambda: hf.Qwen3NextConfig(**_SIZES), "linear_attention"),
    "falcon_h1": (lambda: hf.FalconH1Config(**_SIZES), "hybrid"),
    "lfm2": (lambda: hf.Lfm2Config(**_SIZES, full_attn_idxs=[1]), "conv"),
    "llama4_text": (lambda: hf.Llama4TextConfig(**_SIZES), "chunked_attention"),
    "gemma3n_text": (
        lambda: hf.Gemma3nTextConfig(
            **_SIZES,
            num_kv_shared_layers=2,
            layer_types=["full_attention"] * 4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        "keys and values of earlier layers",
    ),
    "t5": (lambda: hf.T5Config(), "encoder-decoder"),
    "bart": (lambda: hf.BartConfig(), "encoder-decoder"),
}

# Refused by their class, or by what four tokens show.
BY_PROBE: dict[str, tuple[Callable[[], hf.PreTrainedConfig], str]] = {
    "bloom": (
        lambda: hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        "attention interface",
    ),
    "falcon": (lambda: hf.FalconConfig(**_MHA), "attention interface"),
    "gptj": (lambda: hf.GPTJConfig(**_GPT, rotary_dim=8), "attention interface"),
    "mpt": (lambda: hf.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4), "attention interface"),
    "bert": (lambda: hf.BertConfig(**_MHA), "mask other than a causal window"),
    "diffllama": (lambda: hf.DiffLlamaConfig(**_SIZES), "not once per layer"),
    "gemma4_text": (
        lambda: hf.Gemma4TextConfig(
            **_SIZES,
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=64,
        ),
        "differ in the number or the size of their heads",
    ),
}


@pytest.mark.parametrize("name", BY_CONFIG)
def test_refused_by_configuration(name: str) -> None:
    make, reason = BY_CONFIG[name]
    with pytest.raises(ValueError) as refusal:
        check_config(make())
    _check(str(refusal.value), name, reason)


@pytest.mark.parametrize("name", BY_PROBE)
def test_refused_by_class_or_probe(name: str) -> None:
    make, reason = BY_PROBE[name]
    config = make()
    check_config(config)
    with pytest.raises(ValueError) as refusal:
        HFModel(hf.AutoModelForCausalLM.from_config(config))
    _check(str(refusal.value), name, reason)


def _check(message: str, name: str, reason: str) -> None:
    assert repr(name) in message
    assert reason in message
    assert "; use" in message  # a remedy
    assert "\n" not in message


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        HFModel(hf.LlamaModel(hf.LlamaConfig(**_SIZES)))


def test_a_window_that_only_the_mask_knows_is_not_lost() -> None:
    """A family that masks a window without telling the attention function would run without it."""
    model = hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, sliding_window=8))
    forgetful = copy.deepcopy(model.config)
    forgetful.sliding_window, forgetful._attn_implementation = None, NAME
    for layer in model.model.layers:
        layer.self_attn.config = forgetful
    with pytest.raises(ValueError, match="mask of window 8 but tells the attention function nothing"):
        HFModel(model)


def test_layers_that_do_not_attend_are_named() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES))
    model.model.layers[2] = _Skip(model.config)
    with pytest.raises(ValueError, match=r"layers \[2\] keep a state"):
        HFModel(model)


class _Skip(torch.nn.Module):
    def __init__(self, config: hf.PreTrainedConfig) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, **_: object) -> torch.Tensor:
        return self.linear(hidden)
