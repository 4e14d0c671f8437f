"""Chunks computed apart and blended: what depends most on the text around them is computed again."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from winnow._check import integer
from winnow.retrieval.protocol import Chunk
from winnow.store.codecs import ENTRIES, codec_named
from winnow.store.sequence import SequenceStore
from winnow.types import Demotion, Needs, Plan

__all__ = ["Blend", "BlendPool"]


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Reuse of chunks anywhere in a prompt, with the deviating tokens computed again.

    Source: CacheBlend (arXiv 2405.16444); see :func:`winnow.methods.cacheblend.cacheblend`.

    Attributes
    ----------
    recompute : tuple of int
        Of every hundred chunk tokens, how many are still computed behind the check layer, and behind
        each layer after it (gradual filtering); the last holds for all deeper layers. Not increasing.
        ``(0,)`` computes none again, in no layer.
    check_layer : int
        First layer that compares and chooses, at least 1: keys and values of layer 0 know no context.
    deviation : {"keys-and-values", "values", "keys"}
        Squared differences of which are summed over KV heads and dimensions, in float32.
    codec : str
        Form in which the pool stores whole pages of 64 tokens; what is left of a chunk stays raw.
    separator : str or None
        Text that ends a chunk wherever it stands in a prompt; None where the caller divides prompts.
    capacity_bytes : int
        Most memory that the pool may hold. The chunk that was not used for longest goes first.
    """

    recompute: tuple[int, ...] = (15,)
    check_layer: int = 1
    deviation: Literal["keys-and-values", "values", "keys"] = "keys-and-values"
    codec: str = "raw"
    separator: str | None = None
    capacity_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        integer("blend", "check_layer", self.check_layer, 1, "layers")
        integer("blend", "capacity_bytes", self.capacity_bytes, 0, "bytes")
        for share in self.recompute:
            integer("blend", "recompute", share, 0, "tokens of every hundred")
        if (
            not self.recompute
            or self.recompute[0] > 100
            or list(self.recompute) != sorted(self.recompute, reverse=True)
        ):
            raise ValueError(
                f"blend: recompute={list(self.recompute)} will not do; give tokens of every hundred that do "
                "not increase from layer to layer, such as [15] or [30, 20, 15]"
            )
        if self.deviation not in ("keys-and-values", "values", "keys"):
            raise ValueError(
                f"blend: deviation={self.deviation!r} is unknown; give 'keys-and-values', 'values' or 'keys'"
            )
        if self.separator == "":
            raise ValueError("blend: an empty separator divides nothing; leave it out")
        codec_named(self.codec)

    @property
    def needs(self) -> Needs:
        """A walk over the layers, and keys that can be turned to other positions."""
        return Needs(layer_walk=True, rotary=True)

    @property
    def repairs(self) -> bool:
        """Whether any token is computed again."""
        return self.recompute[0] > 0

    def check(self, layers: int) -> None:
        """Raise ``ValueError`` where the model has no layer behind the check layer."""
        if self.check_layer >= layers:
            raise ValueError(
                f"blend: check_layer={self.check_layer} but the model has {layers} layers; give a lower one"
            )

    def pool(self) -> BlendPool:
        """An empty pool."""
        return BlendPool(self)

    def chooses(self, layer: int) -> bool:
        """Whether fewer tokens leave this layer than entered it."""
        return 0 <= layer - self.check_layer < len(self.recompute)

    def choose(self, layer: int, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], of: int) -> Tensor:
        """The tokens that deviate most, as many as ``recompute`` says, in ascending order.

        Among equal ones the earlier stays, so that the choice does not depend on the machine.
        """
        count = min(of * self.recompute[layer - self.check_layer] // 100, len(new[0]))
        sides = {"keys-and-values": (0, 1), "values": (1,), "keys": (0,)}[self.deviation]
        deviation_N = sum(
            ((new[i].float() - old[i].float()).square().sum((1, 2)) for i in sides),
            start=torch.zeros(len(new[0]), device=new[0].device),
        )
        return deviation_N.sort(descending=True, stable=True).indices[:count].sort().values


class BlendPool:
    """Chunks by namespace, begin tokens and token ids. Every method may be called from any thread."""

    def __init__(self, part: Blend) -> None:
        self._codec = part.codec
        self._capacity = part.capacity_bytes
        self._chunks: OrderedDict[tuple[str, bytes, bytes], Chunk] = OrderedDict()
        self._loose: list[Chunk] = []  # found no room, and is in use
        self._mutex = threading.Lock()

    def has(self, tokens: Sequence[int], begin: Sequence[int], namespace: str) -> bool:
        """See :meth:`winnow.retrieval.protocol.ChunkPool.has`."""
        key = _key(tokens, begin, namespace)
        with self._mutex:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return key in self._chunks

    def find(self, tokens: Sequence[int], begin: Sequence[int], namespace: str) -> Chunk | None:
        """See :meth:`winnow.retrieval.protocol.ChunkPool.find`."""
        key = _key(tokens, begin, namespace)
        with self._mutex:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
                chunk.users += 1
            return chunk

    def keep(
        self, tokens: Sequence[int], begin: Sequence[int], namespace: str, store: SequenceStore
    ) -> Chunk:
        """See :meth:`winnow.retrieval.protocol.ChunkPool.keep`.

        A chunk that finds no room is handed out all the same and freed when it is released.
        """
        start, key = len(begin), _key(tokens, begin, namespace)
        assert store.length == start + len(tokens), "the store holds the begin tokens and the chunk"
        own = torch.arange(start, store.length)
        pages = len(tokens) // ENTRIES * ENTRIES if self._codec != "raw" else 0
        form = (Demotion(oldest=pages, codec=self._codec),) if pages else ()
        for layer in range(store.layers):
            store.apply(layer, Plan(keep=(own,) * store.shape.heads, demote=form))
        held = sum(store.bytes().values())
        chunk = Chunk(tokens=len(tokens), start=start, store=store, bytes=held, users=1)
        with self._mutex:
            if key not in self._chunks and self._make_room(held):
                self._chunks[key] = chunk
            else:
                self._loose.append(chunk)
        return chunk

    def release(self, chunk: Chunk) -> None:
        """See :meth:`winnow.retrieval.protocol.ChunkPool.release`."""
        with self._mutex:
            chunk.users -= 1
            assert chunk.users >= 0, "a chunk was released more often than it was handed out"
            if chunk.users == 0 and chunk in self._loose:
                self._loose.remove(chunk)
                chunk.store.close()

    def bytes(self) -> int:
        """Bytes of memory pages that the pool's chunks hold, and those in use that found no room."""
        with self._mutex:
            return self._held() + sum(chunk.bytes for chunk in self._loose)

    def resize(self, capacity_bytes: int) -> None:
        """See :meth:`winnow.retrieval.protocol.Bounded.resize`."""
        with self._mutex:
            self._capacity = capacity_bytes
            self._evict(capacity_bytes)

    def clear(self) -> None:
        """See :meth:`winnow.retrieval.protocol.Bounded.clear`."""
        with self._mutex:
            self._evict(0)

    def _held(self) -> int:
        return sum(chunk.bytes for chunk in self._chunks.values())

    def _make_room(self, needed: int) -> bool:
        """Evict idle chunks until ``needed`` bytes fit; evict none where that does not help."""
        in_use = sum(chunk.bytes for chunk in self._chunks.values() if chunk.users)
        if in_use + needed > self._capacity:
            return False
        self._evict(self._capacity - needed)
        return True

    def _evict(self, most: int) -> None:
        """Drop idle chunks, the least recently used first, until ``most`` bytes are left."""
        held = self._held()
        for key, chunk in [(key, chunk) for key, chunk in self._chunks.items() if not chunk.users]:
            if held <= most:
                return
            held -= chunk.bytes
            del self._chunks[key]
            chunk.store.close()


def _key(tokens: Sequence[int], begin: Sequence[int], namespace: str) -> tuple[str, bytes, bytes]:
    return namespace, array("q", begin).tobytes(), array("q", tokens).tobytes()
