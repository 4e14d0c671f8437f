"""The fast path: Llama-shaped layers with joined weights and few, native operations.

Whether a model is Llama-shaped is read from its modules, and whether that reading is right is decided
by its logits: the runner is admitted only while they equal the general runner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from winnow.kernels.matvec import MAX_ROWS, matvec
from winnow.kernels.pointwise import add_rms_norm, rotate_heads, silu_mul
from winnow.models.hf import HFModel
from winnow.models.rotary import frequencies
from winnow.types import Attend, AttentionSpec

__all__ = ["FusedModel"]

# Largest root-mean-square difference of logits, relative to theirs. A wrong reading of a model is off
# by about one; what remains is the order of sums and, in half precision, one rounding instead of two.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, kw_only=True)
class _Linear:
    weight: Tensor  # [out, in]
    bias: Tensor | None

    def __call__(self, x_NK: Tensor) -> Tensor:
        if len(x_NK) > MAX_ROWS or x_NK.device.type != "cpu":
            return functional.linear(x_NK, self.weight, self.bias)
        y_NO = matvec(x_NK, self.weight)
        return y_NO if self.bias is None else y_NO.add_(self.bias)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    input_norm: Tensor
    qkv: _Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: _Linear
    mlp_norm: Tensor
    gate_up: _Linear
    down: _Linear
    spec: AttentionSpec


class FusedModel:
    """Llama, Mistral, Qwen2, Qwen3 and whatever else has exactly their layers.

    Query, key and value weights become one matrix, and so do gate and up; the model's own parameters
    are then views of the joined matrices, so that nothing is held twice and the model still works.

    Parameters
    ----------
    general : HFModel
        The same model on the general runner; it stays usable.

    Raises
    ------
    ValueError
        If the model is not Llama-shaped, or its logits on a probe differ from the general runner's
        by more than 1e-4 (float32), 1e-2 (float16) or 5e-2 (bfloat16) of their root mean square.

    Notes
    -----
    Satisfies :class:`winnow.types.LanguageModel`, which lists the attributes. Converting or moving
    the underlying model afterwards gives it weights of its own: load it again instead.
    """

    def __init__(self, general: HFModel) -> None:
        module: Any = general.module
        base = _llama_shaped(module, general)
        self.name = general.name
        self.layers = general.layers
        self.kv_heads = general.kv_heads
        self.query_heads = general.query_heads
        self.head_dim = general.head_dim
        self.vocab_size = general.vocab_size
        self.max_length = general.max_length
        self.dtype = general.dtype
        self.device = general.device
        self.fingerprint = general.fingerprint
        self.eos_token_ids = general.eos_token_ids
        self.specs = general.specs
        self.general = general
        self._frequencies, self._factor = frequencies(base.rotary_emb, general.head_dim)
        self._eps = float(base.norm.variance_epsilon)
        with torch.inference_mode(False), torch.no_grad():
            self._layers = [
                _fuse(layer, spec) for layer, spec in zip(base.layers, general.specs, strict=True)
            ]
        self._embedding: Tensor = base.embed_tokens.weight.detach()
        self._norm: Tensor = base.norm.weight.detach()
        self._head = _linear(module.get_output_embeddings())
        self._check()

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """See :meth:`winnow.types.LanguageModel.forward`."""
        token_ids, position_ids, rows = (t.to(self.device) for t in (token_ids, position_ids, rows))
        H, A, D, N = self.kv_heads, self.query_heads, self.head_dim, len(token_ids)
        angles_NE = position_ids[:, None].float() * self._frequencies
        cos_NE, sin_NE = angles_NE.cos().mul_(self._factor), angles_NE.sin().mul_(self._factor)
        x_NK = functional.embedding(token_ids, self._embedding)
        delta_NK: Tensor | None = None
        for index, layer in enumerate(self._layers):
            h_NK = add_rms_norm(x_NK, delta_NK, layer.input_norm, eps=self._eps)
            heads_NAD = layer.qkv(h_NK).view(N, A + 2 * H, D)
            rotate_heads(
                heads_NAD,
                cos_NE,
                sin_NE,
                query_heads=A,
                key_heads=H,
                q_weight_D=layer.q_norm,
                k_weight_D=layer.k_norm,
                eps=self._eps,
            )
            q_NAD, k_NHD, v_NHD = torch.split(heads_NAD, [A, H, H], dim=1)
            out_NAD = attend(index, q_NAD, k_NHD, v_NHD, layer.spec)
            h_NK = add_rms_norm(x_NK, layer.output(out_NAD.reshape(N, A * D)), layer.mlp_norm, eps=self._eps)
            delta_NK = layer.down(silu_mul(layer.gate_up(h_NK)))
        assert delta_NK is not None
        last_MK = add_rms_norm(x_NK[rows], delta_NK[rows], self._norm, eps=self._eps)
        return self._head(last_MK).float()

    def _check(self) -> None:
        """Compare with the general runner, on few rows (matrix-vector) and on many (matrix products)."""
        limit = _TOLERANCE[self.dtype]
        for length in (3, 2 * MAX_ROWS):
            error = _difference(self, self.general, length)
            if not error <= limit:
                raise ValueError(
                    f"{self.name} has Llama's modules but its fused logits differ by {error:.1e} "
                    f"(at most {limit:.0e}); use runner='general'"
                )


def _difference(fused: FusedModel, general: HFModel, length: int) -> float:
    """Root mean square of the difference of logits, relative to theirs, on a probe."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, general.vocab_size, (length,), generator=generator)
    # Near and far positions: a wrong frequency shows only far out.
    positions = torch.linspace(0, general.max_length - 1, length).long()
    rows = torch.arange(length)
    got, want = (m.forward(tokens, positions, rows, _probe_attend) for m in (fused, general))
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def _probe_attend(layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention in plain form; windows and the like are not what is compared here."""
    q_HND, k_HND, v_HND = (x.transpose(0, 1) for x in (q_NHD, k_NHD, v_NHD))
    out_HND = functional.scaled_dot_product_attention(
        q_HND[None], k_HND[None], v_HND[None], is_causal=True, scale=spec.scale, enable_gqa=True
    )[0]
    return out_HND.transpose(0, 1)


def _llama_shaped(module: Any, general: HFModel) -> Any:
    """The decoder inside, whose parts have exactly Llama's names and forms."""
    base = module.base_model
    _need(_parts(base) == {"embed_tokens", "layers", "norm", "rotary_emb"}, "its decoder has other parts")
    for layer in base.layers:
        _need(
            _parts(layer) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
            and _parts(layer.mlp) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
            and _parts(layer.self_attn) - {"q_norm", "k_norm"} == {"q_proj", "k_proj", "v_proj", "o_proj"},
            "its layers have other parts",
        )
        linears = [
            m for m in (*layer.self_attn.children(), *layer.mlp.children()) if hasattr(m, "in_features")
        ]
        _need(len(linears) == 7 and all(type(m) is nn.Linear for m in linears), "its weights are not plain")
        _need(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"), "its activation is not SiLU")
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [m for name, m in layer.self_attn.named_children() if name.endswith("norm")]
        _need(
            all(getattr(m, "variance_epsilon", None) == base.norm.variance_epsilon for m in norms),
            "its norms are not all RMS norms of one epsilon",
        )
    _need(general.dtype in _TOLERANCE, f"its weights are {general.dtype}")
    dtypes = {p.dtype for p in module.parameters()}
    _need(dtypes == {general.dtype}, f"its weights mix {len(dtypes)} dtypes")
    return base


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(f"the fused runner takes Llama-shaped models only: {reason}; use runner='general'")


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _fuse(layer: Any, spec: AttentionSpec) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (
        norm.weight.detach() if (norm := getattr(attention, name, None)) is not None else None
        for name in ("q_norm", "k_norm")
    )
    return _Layer(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=_join((attention.q_proj, attention.k_proj, attention.v_proj)),
        q_norm=q_norm,
        k_norm=k_norm,
        output=_linear(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_join((mlp.gate_proj, mlp.up_proj)),
        down=_linear(mlp.down_proj),
        spec=spec,
    )


def _linear(module: Any) -> _Linear:
    return _Linear(weight=module.weight.detach(), bias=None if module.bias is None else module.bias.detach())


def _join(modules: Sequence[Any]) -> _Linear:
    """One matrix over several outputs; the modules' own weights become views of it."""
    joined: dict[str, Tensor | None] = {"bias": None}
    for name in ("weight", "bias"):
        parameters = [getattr(module, name) for module in modules]
        if any(p is None for p in parameters):
            assert all(p is None for p in parameters)
            continue
        whole = joined[name] = torch.cat([p.detach() for p in parameters])
        for parameter, part in zip(parameters, torch.split(whole, [len(p) for p in parameters]), strict=True):
            parameter.data = part
    weight = joined["weight"]
    assert weight is not None
    return _Linear(weight=weight, bias=joined["bias"])
