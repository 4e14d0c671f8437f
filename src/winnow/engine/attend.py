"""Attend: the one place where the parts of a recipe meet the model.

A :class:`StepAttention` lives for one engine step. The model calls it once per layer with the
packed queries, keys and values; it appends the new entries to each sequence's store, asks
generation for a pattern (prefill) or loading for a view (decode), calls the kernels, merges
what they return and hands observations to the parts that asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.glimpse import decode_glimpse, prefill_glimpse
from winnow.engine.request import Stats
from winnow.engine.sequence import Sequence
from winnow.generation.protocol import PrefillLayer
from winnow.kernels.backend import Backend
from winnow.kernels.decode import decode, decode_mass, group_mass
from winnow.kernels.merge import add_sinks, merge
from winnow.kernels.prefill import prefill
from winnow.loading.protocol import DecodeLayer
from winnow.store.codecs import EncodedSegment
from winnow.types import EVERYTHING, AttentionSpec, Dense, Partial, Pattern, Segment, Selection

__all__ = ["Slice", "StepAttention"]

_WHOLE = Pattern(form=Dense())
# Entries of an encoded segment that are decoded at a time while decoding a token: K and V of
# one tile of all heads stay in the second-level cache.
_TILE = 1024


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows ``first .. last - 1`` of the packed batch: the new tokens of one sequence.

    Attributes
    ----------
    read : int
        First row whose result somebody reads once all layers are through: it is drawn from, or a
        compression looks at its query. ``last`` where there is none.
    prompt : bool
        The rows are prompt tokens (generation acts), not a decode step (loading acts).
    final : bool
        The prompt ends with this slice.
    """

    sequence: Sequence
    stats: Stats
    first: int
    last: int
    read: int
    prompt: bool
    final: bool


class StepAttention:
    """The attention callable of one step; see the module's text."""

    def __init__(self, slices: list[Slice], slots: tuple[int, ...], backend: Backend = "auto") -> None:
        self._slices = slices
        self._slots = slots
        self._layers = len(slots)
        self._backend = backend
        self._positions = [
            torch.arange(at := s.sequence.store.length, at + s.last - s.first, dtype=torch.int32)
            for s in slices
        ]

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Attention of layer ``layer`` over the packed rows; shapes as in ``types.Attend``."""
        outs, at = [q_NHD[:0]], 0
        firsts = self._first_rows(len(q_NHD))
        for part, positions_T, first in zip(self._slices, self._positions, firsts, strict=True):
            if self._owns(layer):
                rows = slice(part.first, part.last)
                part.sequence.store.append(self._slots[layer], k_NHD[rows], v_NHD[rows], positions_T)
            if count := part.last - first:
                run = self._prefill if part.prompt else self._decode
                q_THD = q_NHD[at : at + count]
                outs.append(run(part, layer, q_THD, positions_T[-count:], spec).out.to(q_NHD.dtype))
                at += count
        return outs[1] if len(outs) == 2 else torch.cat(outs)

    def _first_rows(self, queries: int) -> list[int]:
        """Where in each slice the queries begin that a layer gives: of all rows, or those read, or drawn."""
        for firsts in (
            [part.first for part in self._slices],
            [part.read for part in self._slices],
            [part.last - part.final for part in self._slices],
        ):
            if sum(part.last - first for part, first in zip(self._slices, firsts, strict=True)) == queries:
                return firsts
        raise AssertionError(f"{queries} queries are not those of any layer")

    def _owns(self, layer: int) -> bool:
        """Whether a layer has keys and values of its own, or is the first of those that share them."""
        return self._slots.index(self._slots[layer]) == layer

    # ------------------------------------------------------------------ prefill

    def _prefill(
        self, part: Slice, layer: int, q_THD: Tensor, positions_T: Tensor, spec: AttentionSpec
    ) -> Partial:
        sequence = part.sequence
        slot = self._slots[layer]
        segments = tuple(segment.decode() for segment in sequence.store.segments(slot))
        compression, generation = sequence.compression, sequence.recipe.generation
        if not self._owns(layer):
            compression = None
        if compression is not None:
            compression.queries.see(slot, q_THD, positions_T)
        if generation is None:
            patterns: tuple[Pattern, ...] = (_WHOLE,) * len(segments)
        else:
            ctx = PrefillLayer(
                layer=layer,
                layers=self._layers,
                q=q_THD,
                query_positions=positions_T,
                segments=segments,
                spec=spec,
                prompt_end=len(sequence.tokens),
                backend=self._backend,
            )
            patterns = generation.patterns(ctx, sequence.generation_state)
        partials: list[Partial] = []
        for segment, pattern in zip(segments, patterns, strict=True):
            if pattern.done is not None:
                partials.append(pattern.done)
            if pattern.form is not None:
                partials.append(
                    prefill(
                        q_THD,
                        segment,
                        spec=spec,
                        query_positions=positions_T,
                        form=pattern.form,
                        backend=self._backend,
                    )
                )
        part.stats.score_entries += sum(p.pairs for p in partials) + sum(p.scored for p in patterns)
        partial = _with_sinks(merge(partials), spec)
        if compression is not None and compression.wants_mass(prompt=True):
            own = partial if generation is None else None
            seen, pairs = prefill_glimpse(slot, q_THD, positions_T, segments, spec, own, self._backend)
            part.stats.score_entries += pairs
            compression.watch(seen)
        return partial

    # ------------------------------------------------------------------ decode

    def _decode(
        self, part: Slice, layer: int, q_THD: Tensor, positions_T: Tensor, spec: AttentionSpec
    ) -> Partial:
        assert q_THD.shape[0] == 1, "a decode step advances a sequence by one token"
        sequence, loading = part.sequence, part.sequence.recipe.loading
        slot = self._slots[layer]
        # The first layer of those that share entries speaks for all of them.
        compression = sequence.compression if self._owns(layer) else None
        watching = compression is not None and compression.wants_mass(prompt=False)
        if compression is not None:
            compression.queries.step(slot, q_THD, positions_T)
        segments = sequence.store.segments(slot)
        q_HD, position = q_THD[0], int(positions_T[0])
        view = EVERYTHING
        if loading is not None:
            ctx = DecodeLayer(
                layer=layer,
                layers=self._layers,
                q=q_HD,
                position=position,
                segments=segments,
                spec=spec,
                backend=self._backend,
            )
            view = loading.select(ctx, sequence.loading_state)
            if view.scanned:
                _add(part.stats.bytes_read, "host/index", view.scanned)
        selections = view.selections or (None,) * len(segments)
        partial, logits, masses = self._over(
            part.stats, segments, selections, q_HD, spec, position, view.want_logits, watching
        )
        if loading is not None and view.want_logits:
            loading.observe(ctx, logits, sequence.loading_state)
        if compression is not None and watching:
            group = q_HD.shape[0] // segments[0].heads
            compression.watch(decode_glimpse(slot, positions_T, segments, masses, group))
        return partial

    def _over(
        self,
        stats: Stats,
        segments: tuple[Segment | EncodedSegment, ...],
        selections: tuple[Selection | None, ...],
        q_HD: Tensor,
        spec: AttentionSpec,
        position: int,
        want_logits: bool,
        want_mass: bool,
    ) -> tuple[Partial, list[Tensor], list[Tensor]]:
        """Attention over all segments, sinks included; where wanted the logits and the mass of each."""
        one = segments[0]
        if (
            want_mass
            and not want_logits
            and len(segments) == 1
            and spec.sinks is None
            and isinstance(one, Segment)
        ):
            # This kernel's sum is all that probabilities are divided by.
            partial, mass_HS = decode_mass(
                q_HD,
                one,
                spec=spec,
                position=position,
                selection=selections[0],
                backend=self._backend,
            )
            self._count(stats, one, _lists(one, selections[0]), partial)
            return partial, [], [mass_HS]
        partials: list[Partial] = []
        logits: list[Tensor] = []
        for segment, selection in zip(segments, selections, strict=True):
            lists, seen = _lists(segment, selection), []
            for partial in self._attended(segment, selection, q_HD, spec, position, want_logits or want_mass):
                self._count(stats, segment, lists, partial)
                partials.append(partial)
                if partial.logits is not None:
                    seen.append(partial.logits)
            if seen:
                logits.append(seen[0] if len(seen) == 1 else torch.cat(seen, -1))
        partial = _with_sinks(merge(partials), spec)
        if not want_mass:
            return partial, logits, []
        # The mass takes the logits' memory, unless somebody else reads them.
        own = [x.clone() for x in logits] if want_logits else logits
        masses = [group_mass(x, partial.lse[0], s.heads) for x, s in zip(own, segments, strict=True)]
        return partial, logits, masses

    def _attended(
        self,
        segment: Segment | EncodedSegment,
        selection: Selection | None,
        q_HD: Tensor,
        spec: AttentionSpec,
        position: int,
        want_logits: bool,
    ) -> Iterator[Partial]:
        """Attention over one stored segment, by its codec or piece by piece."""
        if isinstance(segment, EncodedSegment):
            direct = segment.attend(
                q_HD,
                spec=spec,
                position=position,
                selection=selection,
                want_logits=want_logits,
                backend=self._backend,
            )
            if direct is not None:
                yield direct
                return
        for piece, chosen in _pieces(segment, selection):
            yield decode(
                q_HD,
                piece,
                spec=spec,
                position=position,
                selection=chosen,
                want_logits=want_logits,
                backend=self._backend,
            )

    @staticmethod
    def _count(stats: Stats, stored: Segment | EncodedSegment, lists: int, partial: Partial) -> None:
        stats.decode_score_entries += partial.pairs
        # One list serves its share of the query heads, which share each load.
        entries = partial.pairs * lists // partial.lse.shape[1]
        for tier, size in stored.reads.items():
            _add(stats.bytes_read, f"{tier}/{stored.codec}", entries * size)


def _with_sinks(partial: Partial, spec: AttentionSpec) -> Partial:
    return partial if spec.sinks is None else add_sinks(partial, spec.sinks)


def _lists(segment: Segment | EncodedSegment, selection: Selection | None) -> int:
    """How many lists of entries a step reads of a segment."""
    return segment.heads if selection is None else selection.indices.shape[0]


def _pieces(
    segment: Segment | EncodedSegment, selection: Selection | None
) -> Iterator[tuple[Segment, Selection | None]]:
    """What the decode kernel reads of one stored segment, decoded where it is encoded."""
    if selection is None:
        for tile in segment.tiles(_TILE):
            yield tile, None
    elif isinstance(segment, Segment):
        yield segment, selection
    else:
        yield segment.gather(selection), None


def _add(counts: dict[str, int], key: str, amount: int) -> None:
    counts[key] = counts.get(key, 0) + amount
