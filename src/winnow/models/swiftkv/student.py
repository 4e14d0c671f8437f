"""The same computation for training: all tokens through all layers, later entries from an earlier output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from winnow.models.rotary import frequencies
from winnow.models.swiftkv.adapter import Adapter

__all__ = ["Student", "teach"]


class Student(nn.Module):
    """A frozen Llama-shaped model with trainable queries, keys, values and one norm behind some layer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The teacher; it is frozen and shared.
    adapter : Adapter
        Where training starts; its tensors become parameters, in float32.
    """

    def __init__(self, model: Any, adapter: Adapter) -> None:
        super().__init__()
        self._model = [model.requires_grad_(False)]  # in a list: not a part that is saved or trained
        self.first, self.group = adapter.layers, adapter.group
        self.names = {name: name.replace(".", "_") for name in adapter.tensors}
        self.weights = nn.ParameterDict(
            {
                self.names[name]: nn.Parameter(x.detach().float().clone())
                for name, x in adapter.tensors.items()
            }
        )
        base = model.base_model
        self._head_dim: int = base.layers[0].self_attn.head_dim
        self._frequencies, self._factor = frequencies(base.rotary_emb, self._head_dim)

    @property
    def adapter(self) -> Adapter:
        """What was learnt so far."""
        tensors = {name: self.weights[key].detach().clone() for name, key in self.names.items()}
        return Adapter(layers=self.first, group=self.group, tensors=tensors)

    def forward(self, ids_BT: Tensor, positions_BT: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[n, V]`` where ``counted_BT`` is True, and what the last layer is given, ``[B, T, K]``."""
        model = self._model[0]
        base = model.base_model
        angles_BTE = positions_BT[..., None].float() * self._frequencies
        cos, sin = (self._factor * f(angles_BTE).repeat(1, 1, 2)[:, None] for f in (torch.cos, torch.sin))
        x_BTK = base.embed_tokens(ids_BT)
        shared: Tensor | None = None
        keys = values = last = torch.empty(0)
        for number, block in enumerate(base.layers):
            last = x_BTK
            normed = block.input_layernorm(x_BTK)
            attention = block.self_attn
            key_norm, query_norm = (getattr(attention, f"{x}_norm", nn.Identity()) for x in "kq")
            if number < self.first:
                q = self._heads(attention.q_proj(normed))
                k, values = (self._heads(f(normed)) for f in (attention.k_proj, attention.v_proj))
                keys = self._turned(key_norm(k), cos, sin)
            else:
                if shared is None:
                    shared = functional.rms_norm(
                        x_BTK, x_BTK.shape[-1:], self.weights["norm"], block.input_layernorm.variance_epsilon
                    )
                q = self._heads(self._linear(f"q.{number}", normed))
                if (number - self.first) % self.group == 0:
                    k, values = (self._heads(self._linear(f"{x}.{number}", shared)) for x in "kv")
                    keys = self._turned(key_norm(k), cos, sin)
            q = self._turned(query_norm(q), cos, sin)
            out = functional.scaled_dot_product_attention(
                q, keys, values, is_causal=True, scale=attention.scaling, enable_gqa=True
            )
            x_BTK = x_BTK + attention.o_proj(out.transpose(1, 2).flatten(2))
            x_BTK = x_BTK + block.mlp(block.post_attention_layernorm(x_BTK))
        logits: Tensor = model.get_output_embeddings()(base.norm(x_BTK[counted_BT]))
        return logits, last

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.names.get(f"{name}.bias")
        return functional.linear(
            x, self.weights[self.names[name]], None if bias is None else self.weights[bias]
        )

    def _heads(self, x_BTN: Tensor) -> Tensor:
        """``[B, heads, T, D]``."""
        return x_BTN.view(*x_BTN.shape[:2], -1, self._head_dim).transpose(1, 2)

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin


@torch.no_grad()
def teach(model: Any, ids_BT: Tensor, positions_BT: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What :class:`Student` returns, from the teacher's own layers."""
    out = model.base_model(
        input_ids=ids_BT,
        # An explicit mask: without one, skipped positions would be taken for packed sequences.
        attention_mask=torch.ones_like(ids_BT),
        position_ids=positions_BT,
        use_cache=False,
        output_hidden_states=True,
    )
    # hidden_states holds what each layer is given, and behind it the output of the last norm.
    return model.get_output_embeddings()(out.last_hidden_state[counted_BT]), out.hidden_states[-2]
