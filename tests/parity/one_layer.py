"""A compression on one layer, driven as the engine drives it, over streams that a test gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.compress import Compression
from winnow.engine.glimpse import decode_glimpse, prefill_glimpse
from winnow.engine.request import Stats
from winnow.kernels.decode import decode, decode_mass, group_mass
from winnow.kernels.merge import merge
from winnow.kernels.prefill import prefill
from winnow.store.codecs import EncodedSegment
from winnow.store.sequence import SequenceStore
from winnow.types import AttentionSpec


class HalfSplit:
    """A small Llama's rotation."""

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = by.double()[:, None] * 10_000.0 ** -(torch.arange(half).double() / half)
        cos, sin = angle.cos(), angle.sin()
        a, b = x[..., :half].double(), x[..., half:].double()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@dataclass
class Model:
    """What a compression asks of a model."""

    spec: AttentionSpec
    layers: int = 1

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        return (self.spec,) * self.layers

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(range(self.layers))

    def rotary(self, layer: int) -> HalfSplit:
        return HalfSplit()


@dataclass
class Step:
    """After a token: attention of its query, and what every KV head holds."""

    out: Tensor  # [H * G, D]
    positions: list[list[int]]
    k: list[Tensor]
    v: list[Tensor]
    bias: list[Tensor | None]


def streams(tokens: int, *, heads: int = 2, group: int = 2, size: int = 16, seed: int = 0):
    """Queries ``[T, H * G, D]``, keys and values ``[T, H, D]`` with some structure in them."""
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads * group, size, generator=make)
    k = torch.randn(tokens, heads, size, generator=make)
    k[::7] *= 2.0
    return q, k, torch.randn(tokens, heads, size, generator=make)


def attended(q: Tensor, segment, spec: AttentionSpec, position: int, want_logits: bool):
    """What the engine does with a stored segment: the codec's own attention, or tile by tile."""
    options = {"spec": spec, "position": position, "want_logits": want_logits}
    if isinstance(segment, EncodedSegment) and (direct := segment.attend(q, **options)) is not None:
        return [direct]
    return [decode(q, tile, **options) for tile in segment.tiles(1024)]


def drive(recipe, q: Tensor, k: Tensor, v: Tensor, *, prompt: int, chunk: int | None = None) -> list[Step]:
    """Run ``prompt`` tokens as a prefill (in chunks), the others one by one; what was there after each.

    The first step returned is that of the prompt's last token.
    """
    tokens, _, size = q.shape
    spec = AttentionSpec(scale=size**-0.5)
    model, stats = Model(spec), Stats()
    compression = Compression(recipe.compression, None)
    store = SequenceStore(layers=1, heads=k.shape[1], head_dim=size, dtype=k.dtype, capacity=tokens + 1)
    compression.queries.begin(0, prompt, active=compression.acts_on_turn(0))
    steps: list[Step] = []
    starts = list(range(0, prompt, chunk or prompt)) + list(range(prompt, tokens))
    for at, end in zip(starts, [*starts[1:], tokens], strict=True):
        positions = torch.arange(at, end, dtype=torch.int32)
        store.append(0, k[at:end], v[at:end], positions)
        segments = store.segments(0)
        if at < prompt:
            segments = tuple(segment.decode() for segment in segments)
            compression.queries.see(0, q[at:end], positions)
            parts = [prefill(q[at:end], s, spec=spec, query_positions=positions) for s in segments]
            partial = merge(parts)
            if compression.wants_mass(prompt=True):
                seen, _ = prefill_glimpse(0, q[at:end], positions, segments, spec, partial, "auto")
                compression.watch(seen)
        else:
            want = compression.wants_mass(prompt=False)
            compression.queries.step(0, q[at:end], positions)
            if want and len(segments) == 1 and not isinstance(segments[0], EncodedSegment):
                partial, mass = decode_mass(q[at], segments[0], spec=spec, position=at)
                masses = [mass]
            else:
                parts = [attended(q[at], segment, spec, at, want) for segment in segments]
                partial = merge([part for of_one in parts for part in of_one])
                if want:
                    logits = [torch.cat([part.logits for part in of_one], -1) for of_one in parts]
                    masses = [group_mass(one, partial.lse[0], k.shape[1]) for one in logits]
            if want:
                group = q.shape[1] // k.shape[1]
                compression.watch(decode_glimpse(0, positions, segments, masses, group))
        store.advance(end - at)
        if end == prompt:
            compression.acted = store.length
        if at < prompt:
            due = compression.acts_on_turn(0) and (end == prompt or compression.at_border(end))
        else:
            due = compression.due(store.length)
        if due:
            compression.act(store, model, stats)
        if end >= prompt:
            held = store.decoded(0)
            heads = range(held.heads)
            steps.append(
                Step(
                    out=partial.out[-1].clone(),
                    positions=[held.positions_of(h).tolist() for h in heads],
                    k=[held.k[h, : int(held.lengths[h])].clone() for h in heads],
                    v=[held.v[h, : int(held.lengths[h])].clone() for h in heads],
                    bias=[
                        None if held.bias is None else held.bias[h, : int(held.lengths[h])].clone()
                        for h in heads
                    ],
                )
            )
    store.close()
    return steps
