"""A dense ``attend`` on the reference kernels with plain lists, independent of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.decode import decode
from winnow.kernels.merge import add_sinks
from winnow.kernels.prefill import prefill
from winnow.types import AttentionSpec, LanguageModel, Segment


class Cache:
    """Every key and value of one sequence, per layer."""

    def __init__(self) -> None:
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        return len(self.k[0]) if self.k else 0

    def append(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> Segment:
        for held, new in ((self.k, k_THD), (self.v, v_THD)):
            held[layer] = torch.cat((held[layer], new)) if layer in held else new.clone()
        k_HSD, v_HSD = (x[layer].transpose(0, 1).contiguous() for x in (self.k, self.v))
        lengths = torch.full((k_HSD.shape[0],), k_HSD.shape[1], dtype=torch.int32)
        return Segment(k=k_HSD, v=v_HSD, lengths=lengths)


class Packed:
    """Attention for one packed step: ``lengths[i]`` new tokens of ``caches[i]``."""

    def __init__(
        self,
        caches: Sequence[Cache],
        lengths: Sequence[int],
        *,
        backend: Backend = "reference",
        blind: bool = False,
    ) -> None:
        self.caches, self.lengths, self.backend = caches, lengths, backend
        self.starts = [cache.length for cache in caches]
        self.blind = blind  # forget windows, soft caps and sinks, to see that they matter

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        sinks = spec.sinks
        if self.blind:
            spec, sinks = replace(spec, window=None, softcap=None), None
        outputs, at = [], 0
        for cache, start, length in zip(self.caches, self.starts, self.lengths, strict=True):
            rows = slice(at, at + length)
            at += length
            segment = cache.append(layer, k_NHD[rows], v_NHD[rows])
            if length == 1:
                part = decode(q_NHD[at - 1], segment, spec=spec, position=start, backend=self.backend)
            else:
                positions = torch.arange(start, start + length, dtype=torch.int32)
                part = prefill(
                    q_NHD[rows], segment, spec=spec, query_positions=positions, backend=self.backend
                )
            outputs.append(part.out if sinks is None else add_sinks(part, sinks).out.to(q_NHD.dtype))
        assert at == len(q_NHD)
        return torch.cat(outputs)


def step(
    model: LanguageModel,
    caches: Sequence[Cache],
    tokens: Sequence[Tensor],
    *,
    backend: Backend = "reference",
    blind: bool = False,
) -> list[Tensor]:
    """Advance every sequence by its tokens in one packed call; logits ``[T, V]`` of each."""
    lengths = [len(t) for t in tokens]
    positions = torch.cat(
        [torch.arange(c.length, c.length + n) for c, n in zip(caches, lengths, strict=True)]
    )
    attend = Packed(caches, lengths, backend=backend, blind=blind)
    logits = model.forward(torch.cat(list(tokens)), positions, torch.arange(sum(lengths)), attend)
    return list(logits.split(lengths))


def greedy(model: LanguageModel, prompt: Tensor, new_tokens: int) -> list[int]:
    """Tokens that greedy decoding appends."""
    cache, tokens, made = Cache(), prompt, []
    for _ in range(new_tokens):
        logits = step(model, [cache], [tokens])[0]
        made.append(int(logits[-1].argmax()))
        tokens = torch.tensor(made[-1:])
    return made
