"""Llama's layers with joined weights and few, native operations: what the fused runners are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from winnow.kernels.matmul import gated_matmul, matmul
from winnow.kernels.pointwise import add_rms_norm, rotate_heads
from winnow.types import Attend, AttentionSpec

__all__ = ["LayerWeights", "Linear", "LlamaStack", "StackWalk"]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A matrix ``[out, in]`` and what is added."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x_NK: Tensor) -> Tensor:
        """``[N, in]`` to ``[N, out]``."""
        return matmul(x_NK, self.weight, self.bias)

    def gated(self, x_NK: Tensor) -> Tensor:
        """``[N, in]`` to ``[N, out / 2]``: ``silu(gate) * up`` of outputs that are gate and then up."""
        return gated_matmul(x_NK, self.weight, self.bias)

    def rows(self, first: int, last: int | None = None) -> Linear:
        """The outputs ``first .. last - 1``; views."""
        return Linear(
            weight=self.weight[first:last], bias=None if self.bias is None else self.bias[first:last]
        )


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer: query, key and value rows joined in ``qkv``, gate and up in ``gate_up``."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    spec: AttentionSpec


@dataclass(frozen=True, kw_only=True)
class LlamaStack:
    """All layers and what surrounds them.

    Attributes
    ----------
    embedding : Tensor
        ``[V, K]``.
    layers : tuple of LayerWeights
    norm : Tensor
        ``[K]`` weight of the last norm.
    head : Linear
    frequencies : Tensor
        ``[D / 2]`` float32 radians per position.
    factor : float
        On cosines and sines (YaRN).
    eps : float
        Of every norm.
    query_heads, kv_heads, head_dim : int
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear
    frequencies: Tensor
    factor: float
    eps: float
    query_heads: int
    kv_heads: int
    head_dim: int

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[N, D / 2]`` float32."""
        angles_NE = position_ids[:, None].to(self.frequencies.device).float() * self.frequencies
        return angles_NE.cos().mul_(self.factor), angles_NE.sin().mul_(self.factor)

    def rotate(
        self,
        heads_NAD: Tensor,
        angles: tuple[Tensor, Tensor],
        layer: LayerWeights,
        *,
        queries: int,
        keys: int,
    ) -> None:
        """Norm (where the layer has one) and RoPE of the first heads, in place."""
        rotate_heads(
            heads_NAD,
            *angles,
            query_heads=queries,
            key_heads=keys,
            q_weight_D=layer.q_norm,
            k_weight_D=layer.k_norm,
            eps=self.eps,
        )

    def attention(
        self, index: int, normed_NK: Tensor, angles: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """``[N, K]``: what a layer's attention adds to the residual stream."""
        layer, A, H, D = self.layers[index], self.query_heads, self.kv_heads, self.head_dim
        heads_NAD = layer.qkv(normed_NK).view(len(normed_NK), A + 2 * H, D)
        self.rotate(heads_NAD, angles, layer, queries=A, keys=H)
        q_NAD, k_NHD, v_NHD = torch.split(heads_NAD, [A, H, H], dim=1)
        out_NAD = attend(index, q_NAD, k_NHD, v_NHD, layer.spec)
        return layer.output(out_NAD.reshape(len(normed_NK), A * D))

    def own_keys_values(self, index: int) -> Linear:
        """The key and value rows of a layer's joined matrix."""
        return self.layers[index].qkv.rows(self.query_heads * self.head_dim)

    def keys_values(
        self, linear: Linear, normed_NK: Tensor, angles: tuple[Tensor, Tensor], layer: LayerWeights
    ) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values ``[N, H, D]`` of a matrix that joins the weights of both."""
        H, D = self.kv_heads, self.head_dim
        heads_NHD = linear(normed_NK).view(len(normed_NK), 2 * H, D)
        self.rotate(heads_NHD, angles, layer, queries=0, keys=H)
        k_NHD, v_NHD = heads_NHD.chunk(2, dim=1)
        return k_NHD, v_NHD

    def narrow(
        self,
        index: int,
        x_MK: Tensor,
        delta_MK: Tensor | None,
        angles_M: tuple[Tensor, Tensor],
        k_NHD: Tensor,
        v_NHD: Tensor,
        attend: Attend,
    ) -> Tensor | None:
        """A layer that only ``M`` rows pass, beside the keys and values of all tokens.

        ``x_MK`` changes in place; what is still to be added to it is returned, None where there are no rows.
        """
        layer, A, D, M = self.layers[index], self.query_heads, self.head_dim, len(x_MK)
        if M == 0:
            attend(index, k_NHD.new_empty(0, A, D), k_NHD, v_NHD, layer.spec)
            return None
        normed_MK = self.normed(x_MK, delta_MK, layer.input_norm)
        q_MAD = layer.qkv.rows(0, A * D)(normed_MK).view(M, A, D)
        self.rotate(q_MAD, angles_M, layer, queries=A, keys=0)
        out_MAD = attend(index, q_MAD, k_NHD, v_NHD, layer.spec)
        return self.mlp(index, x_MK, layer.output(out_MAD.reshape(M, A * D)))

    def mlp(self, index: int, x_NK: Tensor, delta_NK: Tensor) -> Tensor:
        """Add ``delta_NK`` to ``x_NK`` in place; what the layer's MLP adds next."""
        layer = self.layers[index]
        return layer.down(layer.gate_up.gated(self.normed(x_NK, delta_NK, layer.mlp_norm)))

    def normed(self, x_NK: Tensor, delta_NK: Tensor | None, weight_K: Tensor) -> Tensor:
        """Add ``delta_NK`` to ``x_NK`` in place and normalise."""
        return add_rms_norm(x_NK, delta_NK, weight_K, eps=self.eps)

    def run(
        self,
        x_NK: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        layers: range,
        delta_NK: Tensor | None = None,
    ) -> Tensor:
        """Several layers. ``x_NK`` changes in place; what is still to be added to it is returned."""
        for index in layers:
            normed_NK = self.normed(x_NK, delta_NK, self.layers[index].input_norm)
            delta_NK = self.mlp(index, x_NK, self.attention(index, normed_NK, angles, attend))
        assert delta_NK is not None
        return delta_NK

    def logits(self, x_MK: Tensor, delta_MK: Tensor | None) -> Tensor:
        """``[M, V]`` float32."""
        return self.head(self.normed(x_MK, delta_MK, self.norm)).float()


class StackWalk:
    """The layers of a stack one by one; satisfies :class:`winnow.types.LayerWalk`."""

    def __init__(self, stack: LlamaStack) -> None:
        self._stack = stack
        self._at: Tensor | None = None
        self._angles: tuple[Tensor, Tensor] | None = None

    def _angles_at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Kept while the positions stay."""
        if position_ids is not self._at or self._angles is None:
            self._at, self._angles = position_ids, self._stack.angles(position_ids)
        return self._angles

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """See :meth:`winnow.types.LayerWalk.embed`."""
        table = self._stack.embedding
        return functional.embedding(token_ids.to(table.device), table)

    @torch.inference_mode()
    def keys_values(self, layer: int, hidden_NK: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`winnow.types.LayerWalk.keys_values`."""
        stack, weights = self._stack, self._stack.layers[layer]
        normed_NK = stack.normed(hidden_NK.contiguous(), None, weights.input_norm)
        return stack.keys_values(
            stack.own_keys_values(layer), normed_NK, self._angles_at(position_ids), weights
        )

    @torch.inference_mode()
    def layer(self, layer: int, hidden_NK: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """See :meth:`winnow.types.LayerWalk.layer`."""
        x_NK = hidden_NK.clone(memory_format=torch.contiguous_format)
        delta_NK = self._stack.run(x_NK, self._angles_at(position_ids), attend, range(layer, layer + 1))
        return x_NK.add_(delta_NK)

    @torch.inference_mode()
    def finish(self, hidden_MK: Tensor) -> Tensor:
        """See :meth:`winnow.types.LayerWalk.finish`."""
        return self._stack.logits(hidden_MK.contiguous(), None)
