"""The transformed model: a Llama-shaped stack of which prompt tokens pass only the first layers."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from winnow.models.fused import FusedModel
from winnow.models.stack import Linear
from winnow.models.swiftkv.adapter import FILE, Adapter, start
from winnow.types import Attend, LanguageModel, LayerWalk, Rotary

__all__ = ["SwiftKVModel", "transformed"]

_log = logging.getLogger("winnow.models")


class _Names(Protocol):
    """The fields of :class:`winnow.generation.swiftkv.SwiftKV` that name a transformation."""

    group: int
    adapter: str | None

    def first(self, layers: int) -> int: ...


class SwiftKVModel:
    """Satisfies :class:`winnow.types.LanguageModel`, which lists the attributes.

    Parameters
    ----------
    base : FusedModel
        Stays usable; its weights are shared.
    adapter : Adapter

    Raises
    ------
    ValueError
        If the adapter's shapes are not the model's.
    """

    def __init__(self, base: FusedModel, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.name = base.name
        self.layers = base.layers
        self.kv_heads = base.kv_heads
        self.query_heads = base.query_heads
        self.head_dim = base.head_dim
        self.vocab_size = base.vocab_size
        self.max_length = base.max_length
        self.dtype = base.dtype
        self.device = base.device
        self.eos_token_ids = base.eos_token_ids
        self.generates = base.generates
        self.specs = base.specs
        self.fingerprint = f"{base.fingerprint}-swiftkv-{adapter.digest()}"
        self.first = adapter.layers
        later = range(self.first, self.layers)
        self.slots = (*range(self.first), *(self.first + i // adapter.group for i in range(len(later))))
        _check(base, adapter)
        self._norm = adapter.tensors.get("norm")
        # Queries stand alone in the later layers: keys and values come from somewhere else.
        layers = list(base.stack.layers)
        for layer in later:
            layers[layer] = replace(layers[layer], qkv=_linear(adapter, f"q.{layer}"))
        self._stack = replace(base.stack, layers=tuple(layers))
        self._keys_values = {
            layer: _joined(_linear(adapter, f"k.{layer}"), _linear(adapter, f"v.{layer}"))
            for layer in later[:: adapter.group]
        }

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        attend: Attend,
        read: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`winnow.types.LanguageModel.forward`; the later layers take ``rows`` alone."""
        if self._norm is None:
            return self.base.forward(token_ids, position_ids, rows, attend, read)
        token_ids, position_ids, rows = (t.to(self.device) for t in (token_ids, position_ids, rows))
        stack = self._stack
        x_NK = functional.embedding(token_ids, stack.embedding)
        angles = stack.angles(position_ids)
        delta_NK = stack.run(x_NK, angles, attend, range(self.first))
        shared_NK = stack.normed(x_NK, delta_NK, self._norm)  # adds delta to x
        x_MK, delta_MK, angles_M = x_NK[rows], None, (angles[0][rows], angles[1][rows])
        for layer in range(self.first, self.layers):
            k_NHD, v_NHD = self._entries(layer, shared_NK, angles)
            delta_MK = stack.narrow(layer, x_MK, delta_MK, angles_M, k_NHD, v_NHD, attend)
        return stack.logits(x_MK, delta_MK)

    def _entries(self, layer: int, shared_NK: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, H, D]`` of a group, at its first layer; none at the others."""
        if layer not in self._keys_values:
            empty = shared_NK.new_empty(0, self.kv_heads, self.head_dim)
            return empty, empty
        stack = self._stack
        return stack.keys_values(self._keys_values[layer], shared_NK, angles, stack.layers[layer])

    def walk(self) -> LayerWalk:
        """Refused: the later layers' entries do not come from what these are given."""
        raise ValueError(
            f"{self.name} under swiftkv cannot be walked layer by layer: its later layers take keys and "
            "values from an earlier one; leave swiftkv out of this recipe"
        )

    def rotary(self, layer: int) -> Rotary:
        """See :meth:`winnow.types.LanguageModel.rotary`."""
        return self.base.rotary(layer)


def transformed(model: LanguageModel, generation: object) -> LanguageModel:
    """The model as a recipe's generation part asks for it; as it is where the part asks for nothing.

    Raises
    ------
    ValueError
        If the model is not Llama-shaped, or the adapter that the part names is not for it.
    """
    if not _asks(generation):
        return model
    if not isinstance(model, FusedModel):
        raise ValueError(
            f"swiftkv transforms Llama-shaped models on the fused runner, {model.name} is none or runs on "
            "another; use runner='auto', or leave swiftkv out of the recipe"
        )
    return SwiftKVModel(model, _adapter(model, generation).to(model.dtype))


def _adapter(model: FusedModel, asked: _Names) -> Adapter:
    """The adapter that is asked for by name, else the one beside the model's weights, else the start."""
    form = first, group = asked.first(model.layers), asked.group
    if asked.adapter is not None:
        given = Adapter.load(asked.adapter, model=model.fingerprint)
        if given.form != form:
            raise ValueError(
                f"the adapter {asked.adapter} is for layers={given.layers}, group={given.group}, the "
                f"recipe says layers={first}, group={group}; make them agree"
            )
        return given
    why = "give adapter=... of a distillation"
    source = model.general.module.config.name_or_path
    beside = Path(source, FILE)
    if source and beside.is_file():
        try:
            found = Adapter.load(str(beside), model=model.fingerprint)
        except ValueError as error:
            why = str(error)  # such as the same weights in another dtype
        else:
            if found.form == form:
                return found
            why = f"the adapter beside it is for layers={found.layers}, group={found.group}; {why}"
    if first < model.layers:
        _log.warning("swiftkv runs untrained on %s: %s", model.name, why)
    return start(model, first, group)


def _asks(part: object) -> TypeGuard[_Names]:
    return hasattr(part, "adapter") and hasattr(part, "first")


def _check(base: FusedModel, adapter: Adapter) -> None:
    wanted = start(base, adapter.layers, adapter.group).tensors
    shapes, given = ({k: tuple(v.shape) for k, v in x.items()} for x in (wanted, adapter.tensors))
    if shapes != given:
        odd = sorted(name for name in {*shapes, *given} if shapes.get(name) != given.get(name))
        raise ValueError(f"the adapter does not fit {base.name}: {', '.join(odd)}; distil one for this model")


def _linear(adapter: Adapter, name: str) -> Linear:
    return Linear(weight=adapter.tensors[name], bias=adapter.tensors.get(f"{name}.bias"))


def _joined(*parts: Linear) -> Linear:
    biases = [part.bias for part in parts if part.bias is not None]
    return Linear(
        weight=torch.cat([part.weight for part in parts]), bias=torch.cat(biases) if biases else None
    )
