"""The fast path: Llama-shaped layers with joined weights and few, native operations.

Whether a model is Llama-shaped is read from its modules, and whether that reading is right is decided
by its logits: the runner is admitted only while they equal the general runner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from winnow.kernels.matvec import MAX_ROWS
from winnow.models.hf import HFModel
from winnow.models.linear import NativeLinear
from winnow.models.rotary import frequencies
from winnow.models.stack import LayerWeights, Linear, LlamaStack, StackWalk
from winnow.models.turning import PairRotary
from winnow.models.walk import probe_attend
from winnow.store.huge_pages import collapse
from winnow.types import Attend, AttentionSpec, LayerWalk, Rotary

__all__ = ["FusedModel"]

# Largest root-mean-square difference of logits, relative to theirs. A wrong reading of a model is off
# by about one; what remains is the order of sums and, in half precision, one rounding instead of two.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
        self.slots = general.slots
        self.pooling = general.pooling
        self.generates = general.generates
        self.general = general
        inverse, factor = frequencies(base.rotary_emb, general.head_dim)
        with torch.inference_mode(False), torch.no_grad():
            layers = tuple(_fuse(layer, spec) for layer, spec in zip(base.layers, general.specs, strict=True))
        self.stack = LlamaStack(
            embedding=base.embed_tokens.weight.detach(),
            layers=layers,
            norm=base.norm.weight.detach(),
            head=_linear(module.get_output_embeddings()),
            frequencies=inverse,
            factor=factor,
            eps=float(base.norm.variance_epsilon),
            query_heads=general.query_heads,
            kv_heads=general.kv_heads,
            head_dim=general.head_dim,
        )
        self._rotary = PairRotary(frequencies=inverse, first=0, interleaved=False)
        self._check()
        if self.device.type == "cpu":
            _in_huge_pages(self.stack)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        attend: Attend,
        read: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`winnow.types.LanguageModel.forward`."""
        rows = rows.to(self.device)
        if read is not None and len(read) < len(token_ids) and self.layers > 1:
            read = read.to(self.device)
            x_PK, delta_PK = self._run_narrow(token_ids, position_ids, read, attend)
            rows = torch.searchsorted(read, rows)
            return self.stack.logits(x_PK[rows], None if delta_PK is None else delta_PK[rows])
        x_NK, delta_NK = self._run(token_ids, position_ids, attend)
        return self.stack.logits(x_NK[rows], delta_NK[rows])

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """See :meth:`winnow.engine.embedding.GivesHidden.hidden`."""
        return self.stack.normed(*self._run(token_ids, position_ids, attend), self.stack.norm)

    def _run(self, token_ids: Tensor, position_ids: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """``[N, K]`` twice: what the last layer was given, and what it still adds to that."""
        x_NK, angles = self._begin(token_ids, position_ids)
        return x_NK, self.stack.run(x_NK, angles, attend, range(self.layers))

    def _run_narrow(
        self, token_ids: Tensor, position_ids: Tensor, read: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor | None]:
        """The same ``[P, K]`` of the rows that are read: others give the last layer keys and values."""
        stack, last = self.stack, self.layers - 1
        x_NK, angles = self._begin(token_ids, position_ids)
        delta_NK = stack.run(x_NK, angles, attend, range(last))
        normed_NK = stack.normed(x_NK, delta_NK, stack.layers[last].input_norm)  # adds delta to x
        k_NHD, v_NHD = stack.keys_values(stack.own_keys_values(last), normed_NK, angles, stack.layers[last])
        x_PK, angles_P = x_NK[read], (angles[0][read], angles[1][read])
        return x_PK, stack.narrow(last, x_PK, None, angles_P, k_NHD, v_NHD, attend)

    def _begin(self, token_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the first layer is given, and the angles of all."""
        x_NK = functional.embedding(token_ids.to(self.device), self.stack.embedding)
        return x_NK, self.stack.angles(position_ids.to(self.device))

    def walk(self) -> LayerWalk:
        """See :meth:`winnow.types.LanguageModel.walk`."""
        return StackWalk(self.stack)

    def rotary(self, layer: int) -> Rotary:
        """See :meth:`winnow.types.LanguageModel.rotary`; the same in every layer."""
        return self._rotary

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
    got, want = (m.forward(tokens, positions, rows, probe_attend) for m in (fused, general))
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


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
        _need(
            len(linears) == 7 and all(type(m) is NativeLinear for m in linears), "its weights are not plain"
        )
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


def _fuse(layer: Any, spec: AttentionSpec) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (
        norm.weight.detach() if (norm := getattr(attention, name, None)) is not None else None
        for name in ("q_norm", "k_norm")
    )
    return LayerWeights(
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


def _in_huge_pages(stack: LlamaStack) -> None:
    """Every token reads all weights once, so that looking up where they lie is worth saving."""
    linears = [x for layer in stack.layers for x in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    for linear in (*linears, stack.head):
        if linear.weight.is_contiguous():
            collapse(linear.weight.data_ptr(), linear.weight.nbytes)


def _linear(module: Any) -> Linear:
    return Linear(weight=module.weight.detach(), bias=None if module.bias is None else module.bias.detach())


def _join(modules: Sequence[Any]) -> Linear:
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
    return Linear(weight=weight, bias=joined["bias"])
