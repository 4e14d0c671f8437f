"""Memory of a prefix pool: the entries of some tokens, in all layers, in one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from winnow.store.arena import PAGE, HostArena
from winnow.store.codecs import ENTRIES, Codec, EncodedSegment, Plane, codec_named
from winnow.types import Segment

__all__ = ["Form", "Slab", "checked"]


@dataclass(frozen=True)
class Form:
    """What the entries of one name space have in common.

    Attributes
    ----------
    heads : tuple of int
        KV heads of each layer.
    head_dim : int
    dtype : torch.dtype
        Of entries as the model computes them.
    codec : str
        How they lie here.
    """

    heads: tuple[int, ...]
    head_dim: int
    dtype: torch.dtype
    codec: str

    @cached_property
    def codec_made(self) -> Codec:
        """The codec of this name."""
        return codec_named(self.codec)

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """Its tables."""
        return self.codec_made.planes(self.head_dim, self.dtype)

    def cost(self, tokens: int) -> int:
        """Bytes of memory pages that so many tokens take."""
        pages = sum(-(-tokens // p.entries * p.width * p.dtype.itemsize // PAGE) for p in self.planes)
        return sum(self.heads) * pages * PAGE


class Slab:
    """One allocation per plane, ``[heads of all layers, n / entries, width]``, for one node before splits.

    Its first token is at position ``start``; where a codec makes pages, that is a whole number of them.
    """

    def __init__(self, form: Form, tokens: int) -> None:
        self.form = form
        self._rows = [p.width * p.dtype.itemsize for p in form.planes]
        self._arenas = [
            HostArena(sum(form.heads), tokens // p.entries, p.width, p.dtype) for p in form.planes
        ]
        self._live = [(0, tokens)]

    # ------------------------------------------------------------------ entries

    def segment(self, layer: int, first: int, last: int, start: int) -> Segment | EncodedSegment:
        """Tokens ``first .. last - 1`` of a layer, of which the first is at position ``start``; a view."""
        form = self.form
        tables = self._tables(layer, first, last)
        lengths = torch.full((form.heads[layer],), last - first, dtype=torch.int32)
        if form.codec == "raw":
            return Segment(k=tables[0], v=tables[1], lengths=lengths, start=start)
        return EncodedSegment(
            rows=tuple(tables),
            form=form.codec_made,
            head_dim=form.head_dim,
            dtype=form.dtype,
            lengths=lengths,
            start=start,
        )

    def fill(self, layer: int, segments: Sequence[Segment | EncodedSegment], start: int) -> None:
        """Copy what segments that begin at position 0 have from position ``start`` on; encode what is raw."""
        last = start + self._live[-1][1]
        fresh: list[tuple[Tensor, Tensor]] = []  # raw entries side by side, which end at ``at``
        at = start
        for segment in segments:
            a, b = max(start, segment.start), min(last, segment.start + int(segment.lengths[0]))
            if a >= b:
                continue
            inside = slice(a - segment.start, b - segment.start)
            if isinstance(segment, EncodedSegment):
                self._encode(layer, fresh, at - start)
                fresh = []
                self._write(layer, a - start, b - start, _pages(segment, inside))
            else:
                fresh.append((segment.k[:, inside], segment.v[:, inside]))
            at = b
        self._encode(layer, fresh, at - start)

    def _encode(self, layer: int, fresh: list[tuple[Tensor, Tensor]], last: int) -> None:
        """Write raw entries so that they end before token ``last``."""
        if not fresh:
            return
        first = last - sum(k.shape[1] for k, _ in fresh)
        if self.form.codec == "raw":
            for k, v in fresh:
                self._write(layer, first, first + k.shape[1], (k, v))
                first += k.shape[1]
            return
        assert first % ENTRIES == last % ENTRIES == 0, "a pool in a codec shares whole pages"
        k_HnD, v_HnD = (torch.cat(side, dim=1) for side in zip(*fresh, strict=True))
        by_head = [self.form.codec_made.encode(k, v) for k, v in zip(k_HnD, v_HnD, strict=True)]
        self._write(layer, first, last, [torch.stack(rows) for rows in zip(*by_head, strict=True)])

    def _write(self, layer: int, first: int, last: int, rows: Sequence[Tensor]) -> None:
        for table, new in zip(self._tables(layer, first, last), rows, strict=True):
            table.copy_(new)

    def _tables(self, layer: int, first: int, last: int) -> list[Tensor]:
        """Every plane's rows ``[H, n / entries, width]`` of a layer; views."""
        row, heads = sum(self.form.heads[:layer]), self.form.heads[layer]
        return [
            arena.data[row : row + heads, first // p.entries : last // p.entries]
            for arena, p in zip(self._arenas, self.form.planes, strict=True)
        ]

    # ------------------------------------------------------------------ memory

    def nbytes(self) -> int:
        """Memory pages that hold a live token."""
        total = 0
        for plane in range(len(self._rows)):
            after = 0
            for first, last in self._live:
                low, high = self._span(plane, first, last)
                total += high - max(low, after)
                after = high
        return total * PAGE * sum(self.form.heads)

    def resident(self) -> int:
        """Bytes that the kernel says are in memory; slow, for tests."""
        return sum(arena.resident() for arena in self._arenas)

    def free(self, first: int, last: int) -> None:
        """Give back the memory pages of tokens that no other live range touches."""
        self._live.remove((first, last))
        for plane, arena in enumerate(self._arenas):
            low, high = self._span(plane, first, last)
            for other in self._live:
                a, b = self._span(plane, *other)
                if other[1] <= first:
                    low = max(low, b)
                else:
                    high = min(high, a)
            for row in range(sum(self.form.heads)):
                arena.discard(row, low, high)

    def split(self, first: int, at: int, last: int) -> None:
        """Account two nodes where there was one."""
        place = self._live.index((first, last))
        self._live[place : place + 1] = [(first, at), (at, last)]

    def _span(self, plane: int, first: int, last: int) -> tuple[int, int]:
        """Memory pages of a plane that hold these tokens."""
        row, entries = self._rows[plane], self.form.planes[plane].entries
        return first // entries * row // PAGE, -(-last // entries * row // PAGE)


def _pages(segment: EncodedSegment, inside: slice) -> list[Tensor]:
    return [
        table[:, inside.start // plane.entries : inside.stop // plane.entries]
        for table, plane in zip(segment.rows, segment.planes, strict=True)
    ]


def checked(
    layers: Sequence[Sequence[Segment | EncodedSegment]], tokens: int, codec: str
) -> tuple[list[list[Segment | EncodedSegment]], Form]:
    """Only entries that depend on the tokens before them, and on nothing else, may be shared.

    Raises
    ------
    ValueError
        They do not, or they are in another codec, or of several models.
    """
    found: list[list[Segment | EncodedSegment]] = []
    for number, segments in enumerate(layers):
        of_layer: list[Segment | EncodedSegment] = []
        position = 0
        for segment in segments:
            if segment.codec not in ("raw", codec) or segment.bias is not None:
                raise ValueError(
                    f"layer {number} holds entries that are biased or in {segment.codec}; a prefix pool in "
                    f"{codec} takes unbiased ones, raw or in its own codec"
                )
            n = int(segment.lengths[0])
            moved = segment.positions is not None or segment.start != position
            if moved or bool((segment.lengths != n).any()):
                raise ValueError(
                    f"layer {number} is not consecutive from position 0; "
                    "a prefix pool takes no entries that remain after others were dropped"
                )
            position += n
            of_layer.append(segment)
        if position < tokens:
            raise ValueError(
                f"layer {number} holds {position} entries for {tokens} tokens; insert fewer tokens"
            )
        found.append(of_layer)
    sizes = {_size(segment) for of_layer in found for segment in of_layer}
    if len(sizes) != 1 or any(len({s.heads for s in of_layer}) != 1 for of_layer in found):
        raise ValueError("the entries differ in type, head size or heads; insert entries of one model")
    head_dim, dtype = sizes.pop()
    return found, Form(tuple(of_layer[0].heads for of_layer in found), head_dim, dtype, codec)


def _size(segment: Segment | EncodedSegment) -> tuple[int, torch.dtype]:
    if isinstance(segment, EncodedSegment):
        return segment.head_dim, segment.dtype
    return segment.k.shape[2], segment.k.dtype
