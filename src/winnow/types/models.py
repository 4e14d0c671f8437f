"""What the engine needs of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from winnow.types.attention import AttentionSpec
from winnow.types.observation import Rotary

__all__ = ["Attend", "LanguageModel", "LayerWalk"]


Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionSpec], Tensor]
"""``attend(layer, q_NHD, k_NHD, v_NHD, spec) -> out_NHD``: the one place where Winnow meets a model.

``q_NHD`` is ``[N, H * G, D]`` after RoPE, ``k_NHD`` (after RoPE) and ``v_NHD`` are ``[N, H, D]``, ``N``
the tokens of all packed sequences; only the last dimension is contiguous. The result is
``[N, H * G, D]`` in the dtype of the queries. It is called once per layer, in ascending order.
A layer that reads the entries of an earlier one gives no keys and values, and a layer that only some rows
pass (those that are read, or those with logits) gives the queries of these rows alone, in their order, beside
the keys and values of all tokens.
"""


class LayerWalk(Protocol):
    """A model's layers one by one, on a set of tokens that may change between two of them.

    Hidden states are ``[N, K]`` in the model's dtype, as they lie between two layers. Every method
    leaves its arguments as they were. Not safe to use from two threads at once.
    """

    def embed(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """``[N, K]``: what the first layer is given for ``[N]`` tokens."""
        ...

    def keys_values(self, layer: int, hidden_NK: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (after RoPE) and values ``[N, H, D]`` that a layer computes from what it is given."""
        ...

    def layer(self, layer: int, hidden_NK: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """``[N, K]``: a whole layer; ``attend`` is called once."""
        ...

    def finish(self, hidden_MK: Tensor) -> Tensor:
        """``[M, V]`` float32 logits of what the last layer returned."""
        ...


class LanguageModel(Protocol):
    """What the engine needs of a model; it knows neither sequences nor lengths.

    Attributes
    ----------
    name : str
        For messages and reports.
    layers, kv_heads, query_heads, head_dim : int
        ``L``, ``H``, ``H * G`` and ``D``, equal in every layer.
    vocab_size : int
        Columns of the logits.
    max_length : int
        Positions that the model was made for: ``position_ids`` must stay below it.
    dtype : torch.dtype
        Of the weights, so of queries, keys and values.
    device : torch.device
    fingerprint : str
        Hexadecimal digest of configuration and weights; equal only for equal models.
    eos_token_ids : tuple of int
        Tokens that end a generation.
    generates : bool
        Whether it has a head; one that came without embeds texts.
    specs : tuple of AttentionSpec
        What each layer's ``attend`` is called with.
    slots : tuple of int
        Per layer, the layer of the store that holds its entries: its own number, but where layers share
        one set of entries. They ascend from 0 without a gap.
    """

    name: str
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    generates: bool
    specs: tuple[AttentionSpec, ...]
    slots: tuple[int, ...]

    def rotary(self, layer: int) -> Rotary | None:
        """How a layer turns keys and queries; None for a layer without rotation.

        Raises
        ------
        ValueError
            If the model's positions cannot be moved (learned or biased positions).
        """
        ...

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        attend: Attend,
        read: Tensor | None = None,
    ) -> Tensor:
        """Run all layers over packed tokens.

        Parameters
        ----------
        token_ids, position_ids : Tensor
            ``[N]`` int64, sequences one after the other without padding.
        rows : Tensor
            ``[M]`` int64: which of the ``N`` rows get logits; may be empty.
        attend : Attend
        read : Tensor or None
            ``[P]`` int64, ascending, ``rows`` among them: the rows that pass the last layer, of which the
            others need only keys and values. None lets all pass, and so may a model that cannot tell.

        Returns
        -------
        Tensor
            ``[M, V]`` float32 logits.
        """
        ...

    def walk(self) -> LayerWalk:
        """The same layers, one by one.

        Raises
        ------
        ValueError
            If this model's layers cannot be walked, with the reason.
        """
        ...
