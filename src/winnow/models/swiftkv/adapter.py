"""The weights that SwiftKV adds to a model: one norm, later layers' queries, groups' keys and values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from winnow.models.fused import FusedModel
from winnow.models.stack import LlamaStack
from winnow.profiles import load_profile
from winnow.types import Profile

__all__ = ["FILE", "KIND", "Adapter", "start"]

KIND = "swiftkv"
#: what distillation writes; beside a model's weights it is found without being named
FILE = "swiftkv.safetensors"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """New weights; biases are there where the model has them.

    Attributes
    ----------
    layers : int
        Layers that every prompt token passes.
    group : int
        Later layers that share keys and values.
    tensors : mapping of str to Tensor
        ``norm`` ``[K]``; ``q.<layer>`` ``[H * G * D, K]``; ``k.<layer>`` and ``v.<layer>`` ``[H * D, K]``
        of the first layer of each group; ``<name>.bias``.
    """

    layers: int
    group: int
    tensors: Mapping[str, Tensor]

    @property
    def form(self) -> tuple[int, int]:
        """``layers`` and ``group``."""
        return self.layers, self.group

    def profile(self, model: str) -> Profile:
        """As a file keeps it, made for the model of this fingerprint."""
        tensors = {"form": torch.tensor(self.form), **self.tensors}
        return Profile(kind=KIND, model=model, tensors=tensors)

    @classmethod
    def load(cls, path: str, *, model: str) -> Adapter:
        """Read what :meth:`profile` gave to a file.

        Raises
        ------
        ValueError
            If it is not there, is something else, or was made for another model.
        """
        profile = load_profile(path, model=model)
        if profile.kind != KIND:
            raise ValueError(
                f"{path} is a profile of kind {profile.kind!r}, not of {KIND!r}; give an adapter"
            )
        tensors = dict(profile.tensors)
        layers, group = (int(x) for x in tensors.pop("form"))
        return cls(layers=layers, group=group, tensors=tensors)

    def digest(self) -> str:
        """16 hexadecimal digits of form and weights."""
        digest = hashlib.sha256(f"{self.layers} {self.group}".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, dtype: torch.dtype) -> Adapter:
        """The same in another dtype."""
        return replace(self, tensors={name: x.detach().to(dtype) for name, x in self.tensors.items()})


def start(model: FusedModel, layers: int, group: int) -> Adapter:
    """The start of distillation, from the model's own weights.

    The norm is that of the first later layer, queries are each layer's own, keys and values the mean
    over a group.
    """
    stack = model.stack
    tensors: dict[str, Tensor] = {}
    if layers < model.layers:
        tensors["norm"] = stack.layers[layers].input_norm.clone()
    for layer in range(layers, model.layers):
        tensors |= _named(f"q.{layer}", *_sum(stack, [layer], 0, stack.query_heads))
    first_key = stack.query_heads
    for layer in range(layers, model.layers, group):
        members = list(range(layer, layer + group))
        for side, name in enumerate("kv"):
            tensors |= _named(
                f"{name}.{layer}", *_sum(stack, members, first_key + side * stack.kv_heads, stack.kv_heads)
            )
    return Adapter(layers=layers, group=group, tensors=tensors)


def _sum(stack: LlamaStack, members: list[int], head: int, heads: int) -> tuple[Tensor, Tensor | None]:
    """Mean weight and bias of some heads' rows over layers, in float32 before it is rounded."""
    first, last = head * stack.head_dim, (head + heads) * stack.head_dim
    parts = [stack.layers[layer].qkv.rows(first, last) for layer in members]
    biases = [part.bias for part in parts if part.bias is not None]
    weight = torch.stack([part.weight.float() for part in parts]).mean(0).to(parts[0].weight.dtype)
    if not biases:
        return weight, None
    return weight, torch.stack([bias.float() for bias in biases]).mean(0).to(weight.dtype)


def _named(name: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {name: weight} if bias is None else {name: weight, f"{name}.bias": bias}
