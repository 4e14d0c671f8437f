"""Walking a model of `transformers` layer by layer, whatever its family.

What surrounds the layers (scaled embeddings, rotary tables per layer type, final norm, scaled or capped
logits) stays the family's own code: it runs in a *frame*, a copy of the modules around the same
parameters in which a stub stands for every layer. The stub notes what its layer would have been called
with and hands the hidden states on, or hands on others. Whether this is right is decided by a probe.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from winnow.models.interface import attending
from winnow.models.refuse import unsupported
from winnow.types import Attend, AttentionSpec, LanguageModel, LayerWalk

__all__ = ["GeneralWalk", "check_walk", "probe_attend"]

# Largest difference of the probe's logits between walk and forward, relative to their root mean square.
# Both run the same operations on the same numbers.
_TOLERANCE = 1e-3
_PROBE_TOKENS = 5


class _Enough(Exception):  # noqa: N818 (it is no error: a layer is left as soon as its keys are known)
    """Leaves a layer from inside its attention."""


class _Stub(nn.Module):
    """In a layer's place: notes what it was called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some families look at plain facts of a layer, such as its type of attention, before they call it.
        for name, value in vars(layer).items():
            if isinstance(value, (str, int, float)) and not name.startswith("_"):
                setattr(self, name, value)
        self.given: Tensor | None = None
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.result: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.given, self.call = hidden, (args, kwargs)
        return hidden if self.result is None else self.result


class GeneralWalk:
    """The layers of a model whose attention is Winnow's; satisfies :class:`winnow.types.LayerWalk`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As :class:`winnow.models.hf.HFModel` runs it.
    layers : int

    Raises
    ------
    ValueError
        If the model has no list of layers that each take hidden states first.
    """

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        self._type = model.config.model_type
        self._device = model.device
        self._layers = _stack(model, layers)
        stubs = [_Stub(layer) for layer in self._layers]
        self._first, self._last, self._stubs = stubs[0], stubs[-1], stubs
        known: dict[int, Any] = {id(p): p for p in model.parameters()}
        known |= {id(layer): stub for layer, stub in zip(self._layers, stubs, strict=True)}
        self._frame = copy.deepcopy(model, known)
        self._at: Tensor | None = None
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """See :meth:`winnow.types.LayerWalk.embed`."""
        self._surround(token_ids, position_ids)
        assert self._first.given is not None
        return self._first.given[0]

    @torch.inference_mode()
    def keys_values(self, layer: int, hidden_NK: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`winnow.types.LayerWalk.keys_values`."""
        seen: list[tuple[Tensor, Tensor]] = []

        def look(index: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec) -> Tensor:
            seen.append((k_NHD, v_NHD))
            raise _Enough

        try:
            self.layer(layer, hidden_NK, position_ids, look)
        except _Enough:
            return seen[0]
        raise AssertionError("a layer did not attend")

    @torch.inference_mode()
    def layer(self, layer: int, hidden_NK: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """See :meth:`winnow.types.LayerWalk.layer`."""
        args, kwargs = self._arguments(position_ids)[layer]
        with attending(attend):
            out = self._layers[layer](hidden_NK[None], *args, **kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden[0]

    @torch.inference_mode()
    def finish(self, hidden_MK: Tensor) -> Tensor:
        """See :meth:`winnow.types.LayerWalk.finish`."""
        zeros_1M = torch.zeros(1, len(hidden_MK), dtype=torch.long, device=self._device)
        self._last.result = hidden_MK[None]
        try:
            logits: Tensor = self._frame(input_ids=zeros_1M, position_ids=zeros_1M, use_cache=False).logits
        finally:
            self._last.result = None
        return logits[0].float()

    def _arguments(self, position_ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each layer is called with beside the hidden states; kept while the positions stay."""
        if position_ids is not self._at:
            self._surround(torch.zeros_like(position_ids), position_ids)
        return self._calls

    def _surround(self, token_ids: Tensor, position_ids: Tensor) -> None:
        """Run what lies around the layers."""
        self._frame.base_model(
            input_ids=token_ids.to(self._device)[None],
            position_ids=position_ids.to(self._device)[None],
            use_cache=False,
        )
        self._at, self._calls = position_ids, [stub.call for stub in self._stubs]


def _stack(model: PreTrainedModel, layers: int) -> list[nn.Module]:
    """The model's layers in order: the list of modules that each hold the attention of their own number."""
    found = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers and _numbered(module)
    ]
    if len(found) != 1:
        raise unsupported(
            model.config.model_type,
            f"it has {len(found)} lists of {layers} attention layers, so its layers cannot be walked",
            "use a recipe that leaves the layers to the model",
        )
    return found[0]


def _numbered(modules: nn.ModuleList) -> bool:
    return all(
        any(getattr(inner, "layer_idx", None) == number for inner in layer.modules())
        for number, layer in enumerate(modules)
    )


@torch.inference_mode()
def check_walk(walk: LayerWalk, model: LanguageModel, name: str) -> None:
    """Refuse a walk whose logits differ from the model's own.

    Raises
    ------
    ValueError
        Naming the model type, ``name``.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (_PROBE_TOKENS,), generator=generator)
    # Near and far positions: a wrong frequency shows only far out.
    positions = torch.linspace(0, model.max_length - 1, _PROBE_TOKENS).long()
    wanted_NV = model.forward(tokens, positions, torch.arange(_PROBE_TOKENS), probe_attend)
    remedy = "use a recipe that leaves the layers to the model"
    try:
        hidden_NK = walk.embed(tokens, positions)
        for layer in range(model.layers):
            hidden_NK = walk.layer(layer, hidden_NK, positions, probe_attend)
        error = (walk.finish(hidden_NK) - wanted_NV).abs().max() / wanted_NV.square().mean().sqrt()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as reason:
        first_line = next(iter(str(reason).splitlines()), type(reason).__name__)
        raise unsupported(name, f"its layers do not run one by one ({first_line})", remedy) from reason
    if not float(error) <= _TOLERANCE:
        raise unsupported(
            name, f"its layers, run one by one, give other logits (by {float(error):.1e})", remedy
        )


def probe_attend(layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention in plain form; windows and the like are not what is compared here."""
    q_HND, k_HND, v_HND = (x.transpose(0, 1) for x in (q_NHD, k_NHD, v_NHD))
    out_HND = functional.scaled_dot_product_attention(
        q_HND[None], k_HND[None], v_HND[None], is_causal=True, scale=spec.scale, enable_gqa=True
    )[0]
    return out_HND.transpose(0, 1)
