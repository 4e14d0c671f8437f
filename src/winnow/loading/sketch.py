"""Sketch: scan a small copy of every key, read exactly what scores highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from winnow._check import integer
from winnow.kernels.key_scan import KeyCodes, key_scan, quantize_keys
from winnow.loading.lists import Carried, Stored, choose
from winnow.loading.protocol import DecodeLayer
from winnow.loading.side_data import SideData, updated
from winnow.types import EVERYTHING, Needs, View

__all__ = ["Sketch"]

_GROW = 1024  # entries by which the copy's reserve grows, so that a step copies nothing


@dataclass
class SketchState:
    """Codes of the selecting layers, and the choice on its way through a step."""

    copies: dict[int, list[SideData[KeyCodes]]] = field(default_factory=dict)
    due: bool = False
    chosen: Carried = field(default_factory=Carried)


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """Top-k over a quantised copy of the keys; attention itself over the true entries.

    A part of Winnow's own, not a published method. Its relatives keep other side data to the same
    end: label channels (Double Sparsity), page bounds (Quest), transposed keys (SparQ).

    In a selecting layer, a step scans 4 or 8 bits of every key, takes the largest product in each
    group of query heads, and reads ``keep`` entries per KV head: the first ``sinks``, the last
    ``recent`` (the current token among them) and the highest scores. Layers between read the same
    positions. With ``every=1`` nothing is carried and every layer selects for itself.

    Attributes
    ----------
    keep : int
        Entries per KV head that a step reads, sinks and recent ones included.
    bits : {4, 8}
        Of each element of the copy.
    every : int
        Layers 0, ``every``, 2 ``every``, ... select, and hold a copy.
    recent : int
        Last entries that are always read, at least 1.
    sinks : int
        First entries that are always read.

    Notes
    -----
    The copy counts as stored (``state_bytes``), its scan as read (``View.scanned``). It follows the
    entries: new ones are added step by step, and a segment that changed otherwise is copied anew.
    Layers with a sliding window of the model read their window and do not select.
    """

    keep: int
    bits: Literal[4, 8] = 4
    every: int = 1
    recent: int = 64
    sinks: int = 4

    def __post_init__(self) -> None:
        integer("sketch", "keep", self.keep, 1)
        integer("sketch", "every", self.every, 1, "layers")
        integer("sketch", "recent", self.recent, 1)
        integer("sketch", "sinks", self.sinks, 0)
        if self.bits not in (4, 8):
            raise ValueError(f"sketch: bits={self.bits!r} will not do; give 4 or 8")
        if self.keep <= self.recent + self.sinks:
            raise ValueError(
                f"sketch: keep={self.keep} has no room beside {self.sinks} sinks and {self.recent} recent "
                f"entries; keep at least {self.recent + self.sinks + 1} or force fewer"
            )

    @property
    def needs(self) -> Needs:
        """Nothing: the part keeps its own copy of the keys."""
        return Needs()

    def check(self, layers: int) -> None:
        """Any number of layers will do."""

    def state(self) -> SketchState:
        """Empty state for one sequence."""
        return SketchState()

    def select(self, ctx: DecodeLayer, state: SketchState) -> View:
        """Everything where it is no more than ``keep``, else the entries that score highest."""
        if ctx.layer == 0:
            state.chosen.clear()
        if ctx.layer % self.every == 0:
            state.due = True
        if ctx.spec.window is not None:
            return EVERYTHING
        if state.due:
            state.due = False
            state.chosen.clear()
            held_H = torch.stack([segment.lengths for segment in ctx.segments]).sum(0)
            if int(held_H.max()) > self.keep:
                return self._scan(ctx, state)
        return View(selections=state.chosen.read(ctx.segments)) if state.chosen else EVERYTHING

    def observe(self, ctx: DecodeLayer, logits: Sequence[Tensor], state: SketchState) -> None:
        """Never called: no view asks for logits."""

    def state_bytes(self, state: SketchState) -> int:
        """Bytes of the codes and scales, with their reserve."""
        copies = [copy.rows for of_layer in state.copies.values() for copy in of_layer]
        return sum(codes.codes.nbytes + codes.scales.nbytes for codes in copies)

    def _scan(self, ctx: DecodeLayer, state: SketchState) -> View:
        held = state.copies.setdefault(ctx.layer, [])
        del held[len(ctx.segments) :]
        scores, scanned = [], 0
        biased = any(getattr(segment, "bias", None) is not None for segment in ctx.segments)
        for i, segment in enumerate(ctx.segments):
            copy = updated(held[i] if i < len(held) else None, segment, _Codes(self.bits, ctx))
            held[i : i + 1] = [copy]
            score_HS = key_scan(ctx.q, copy.rows, segment.lengths, reduce="max", backend=ctx.backend)
            if biased:
                score_HS *= ctx.spec.scale
                if isinstance(bias := getattr(segment, "bias", None), Tensor):
                    score_HS += bias[:, : score_HS.shape[1]]
            scores.append(score_HS)
            scanned += int(segment.lengths.sum()) * copy.rows.bytes_per_entry
        widths = [one.shape[1] for one in scores]
        best_HS = scores[0] if len(scores) == 1 else torch.cat(scores, 1)
        self._force(best_HS, widths, ctx)
        selections = choose(best_HS, widths, self.keep, backend=ctx.backend)
        if self.every > 1:
            state.chosen.put(ctx.segments, selections)
        return View(selections=selections, scanned=scanned)

    def _force(self, best_HS: Tensor, widths: Sequence[int], ctx: DecodeLayer) -> None:
        """Give the first and last entries of every head, over all segments, infinite scores."""
        by_head = list(zip(*(segment.lengths.tolist() for segment in ctx.segments), strict=True))
        heads: Sequence[int | slice] = range(len(by_head))
        if len(set(by_head)) == 1:  # the rule: all heads at once
            by_head, heads = by_head[:1], [slice(None)]
        for h, lengths in zip(heads, by_head, strict=True):
            first, before, behind = 0, 0, sum(lengths)
            for n, width in zip(lengths, widths, strict=True):
                behind -= n
                best_HS[h, first : first + max(0, min(n, self.sinks - before))] = torch.inf
                best_HS[h, first + max(0, n - max(0, self.recent - behind)) : first + n] = torch.inf
                before += n
                first += width


@dataclass(frozen=True)
class _Codes:
    """Codes of every key. An encoded segment is decoded whole; it changes by demotion, not by step."""

    bits: Literal[4, 8]
    ctx: DecodeLayer

    def empty(self, segment: Stored) -> KeyCodes:
        q = self.ctx.q
        return KeyCodes.empty(segment.heads, 0, q.shape[1], self.bits, q.device)

    def roomy(self, rows: KeyCodes, segment: Stored, entries: int) -> KeyCodes:
        return rows if entries <= rows.capacity else rows.grown(-(-entries // _GROW) * _GROW)

    def write(self, rows: KeyCodes, segment: Stored, done: Sequence[int], lengths: Sequence[int]) -> None:
        begin_H = torch.tensor(done, dtype=torch.int32)
        quantize_keys(segment.decode().k, begin_H, segment.lengths, rows, backend=self.ctx.backend)
