"""Refusal of models that Winnow cannot run, by name, with the reason and a remedy.

First the configuration is read (:func:`check_config`), then four tokens go through the model and
what its layers ask of the attention function is looked at (:func:`probe`). Only what is uniform and
complete passes; nothing is guessed from a list of model names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnow.models.interface import UNBOUNDED, attending, windows_in_masks
from winnow.types import AttentionSpec

__all__ = ["Facts", "check_config", "check_model", "probe", "unsupported"]

_SEQUENTIAL = ("full_attention", "sliding_attention")
_PROBE_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the probe saw: the sizes that hold in every layer, and each layer's specification."""

    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    vocab_size: int
    specs: tuple[AttentionSpec, ...]


def unsupported(model_type: str, reason: str, remedy: str) -> ValueError:
    """One line: which model, why not, what to do."""
    return ValueError(f"model type {model_type!r} is not supported: {reason}; {remedy}")


def check_config(config: Any) -> None:
    """Refuse what the configuration alone rules out, before any weight is read.

    Parameters
    ----------
    config : transformers.PreTrainedConfig

    Raises
    ------
    ValueError
        Naming the model type, the reason and a remedy.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise unsupported(
            name, "it is an encoder-decoder with cross-attention", "use a decoder-only language model"
        )
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise unsupported(
            name,
            "its multi-head latent attention (MLA) caches a compressed latent, not keys and values per head",
            "use a model with multi-head or grouped-query attention",
        )
    others = sorted(set(getattr(text, "layer_types", None) or ()) - set(_SEQUENTIAL))
    if others:
        raise unsupported(
            name,
            f"its layers of type {', '.join(others)} are neither full nor sliding-window attention",
            "use a model whose layers are all full or sliding-window attention",
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise unsupported(
            name,
            f"its last {text.num_kv_shared_layers} layers read the keys and values of earlier layers",
            "use a model whose layers each have their own keys and values",
        )


def check_model(model: PreTrainedModel) -> None:
    """Refuse classes that do not route attention through the attention interface, or have no head."""
    name = model.config.model_type
    if model.get_output_embeddings() is None or not model.can_generate():
        raise unsupported(
            name,
            f"{type(model).__name__} has no language-model head",
            "load it with transformers.AutoModelForCausalLM",
        )
    if not type(model)._can_set_attn_implementation():
        raise unsupported(
            name,
            f"{type(model).__name__} does not use transformers' attention interface",
            "use a model that supports model.set_attn_implementation",
        )


class _Witness:
    """An ``attend`` that notes how it was called and returns the values' average."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.shapes: list[tuple[torch.Size, torch.Size, torch.Size]] = []
        self.specs: list[AttentionSpec] = []
        self.keys: list[Tensor] = []

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        self.layers.append(layer)
        self.shapes.append((q_NHD.shape, k_NHD.shape, v_NHD.shape))
        self.specs.append(spec)
        self.keys.append(k_NHD)  # kept alive, so that equal addresses mean shared keys
        return (
            v_NHD.mean(0, keepdim=True)
            .repeat_interleave(q_NHD.shape[1] // v_NHD.shape[1], 1)
            .expand_as(q_NHD)
        )


def probe(model: PreTrainedModel) -> Facts:
    """Send four tokens through a model whose attention is Winnow's and look at what it asks for.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With ``attn_implementation`` :data:`winnow.models.interface.NAME`.

    Returns
    -------
    Facts

    Raises
    ------
    ValueError
        If attention is not called exactly once per layer in order, if layers differ in their
        heads, share keys, or mask otherwise than causally within the window they announce.
    """
    config = model.config.get_text_config(decoder=True)
    name, expected = model.config.model_type, int(config.num_hidden_layers)
    witness = _Witness()
    tokens = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=model.device)
    positions = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    with torch.inference_mode(), attending(witness), windows_in_masks() as mask_windows:
        try:
            logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise unsupported(
                name,
                f"its forward fails on packed tokens without a cache ({first_line})",
                "use a decoder-only model with the attention interface",
            ) from error
    _check_layers(name, witness, expected)
    _check_shapes(name, witness)
    _check_windows(name, witness.specs, mask_windows)
    (queries, keys, _) = witness.shapes[0]
    return Facts(
        layers=expected,
        kv_heads=keys[1],
        query_heads=queries[1],
        head_dim=queries[2],
        vocab_size=logits.shape[-1],
        specs=tuple(witness.specs),
    )


def _check_layers(name: str, witness: _Witness, expected: int) -> None:
    if witness.layers != list(range(expected)):
        silent = sorted(set(range(expected)) - set(witness.layers))
        reason = (
            f"layers {silent} keep a state that is not attention over keys and values"
            if silent
            else f"attention ran in the order {witness.layers}, not once per layer"
        )
        raise unsupported(name, reason, "use a model whose every layer attends once")
    if len({key.data_ptr() for key in witness.keys}) != expected:
        raise unsupported(
            name,
            "some layers share their keys",
            "use a model whose layers each have their own keys and values",
        )


def _check_shapes(name: str, witness: _Witness) -> None:
    if len(set(witness.shapes)) != 1:
        raise unsupported(
            name,
            "its layers differ in the number or the size of their heads",
            "use a model with the same heads in every layer",
        )
    queries, keys, values = witness.shapes[0]
    if values != keys or queries[2] != keys[2] or queries[1] % keys[1] or keys[0] != _PROBE_TOKENS:
        raise unsupported(
            name,
            f"queries {tuple(queries)}, keys {tuple(keys)} and values {tuple(values)} do not group by head",
            "use a model with multi-head or grouped-query attention",
        )


def _check_windows(name: str, specs: Sequence[AttentionSpec], mask_windows: Sequence[int | None]) -> None:
    for layer, (spec, window) in enumerate(zip(specs, mask_windows, strict=True)):
        if window is not None and window != (spec.window or UNBOUNDED):
            told = "nothing" if spec.window is None else f"a window of {spec.window}"
            wants = "other than a causal window" if window < 0 else f"of window {window or 'unbounded'}"
            raise unsupported(
                name,
                f"layer {layer} uses a mask {wants} but tells the attention function {told}",
                "use a model that attends causally, in full or within a sliding window",
            )
