"""Landmarks: read the chunks whose mean key matches the query best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from winnow._check import integer
from winnow.loading.lists import Stored, choose
from winnow.loading.page_table import PageTable, updated
from winnow.loading.protocol import DecodeLayer
from winnow.store.codecs import EncodedSegment
from winnow.store.codecs.low_rank import CHUNK
from winnow.types import EVERYTHING, Needs, Selection, View

__all__ = ["Landmarks", "LandmarksState"]


@dataclass
class LandmarksState:
    """Landmarks of what does not store its own, by layer and number of the segment."""

    tables: dict[int, dict[int, PageTable]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Landmarks:
    """Choice of chunks by the attention that their mean keys get.

    Source: ShadowKV (arXiv 2410.21465), ``models/kv_cache.py``.

    Over the landmarks of a layer every query head has a softmax; a chunk's score is the largest in the
    group of its KV head, and each KV head reads the chunks with the largest scores. What stores no
    landmarks (the newest tokens, outliers, what was generated) is read whole.

    Attributes
    ----------
    keep : int
        Entries per KV head that a step reads of what has landmarks, in whole chunks.
    chunk : int
        Entries that a landmark stands for; stored ones stand for 8.
    raw : bool
        Make landmarks of what stores none too, so that it is chosen from as well. The chunk of the current
        token is then always read.
    """

    keep: int = 2048
    chunk: int = CHUNK
    raw: bool = False

    exempt = {  # noqa: RUF012 (read by the contract suite)
        "segments": "chunks are counted inside a segment, so where one begins moves them",
    }

    def __post_init__(self) -> None:
        integer("landmarks", "chunk", self.chunk, 1)
        integer("landmarks", "keep", self.keep, self.chunk)
        if self.chunk != CHUNK and not self.raw:
            raise ValueError(
                f"landmarks: stored landmarks stand for {CHUNK} entries, not {self.chunk}; "
                f"give chunk={CHUNK} or raw=True"
            )

    @property
    def needs(self) -> Needs:
        """Nothing: landmarks are stored, or made by the part."""
        return Needs()

    def check(self, layers: int) -> None:
        """Any number of layers will do."""

    def state(self) -> LandmarksState:
        """Empty state for one sequence."""
        return LandmarksState()

    def select(self, ctx: DecodeLayer, state: LandmarksState) -> View:
        """Everything where it is no more than the budget, else the chunks with the largest scores."""
        chosen = [i for i, s in enumerate(ctx.segments) if self.raw or _stored(s) is not None]
        held = sum((ctx.segments[i].lengths for i in chosen), torch.zeros(1, dtype=torch.int32))
        if ctx.spec.window is not None or int(held.max()) <= self.keep:
            return EVERYTHING
        logits, scanned = [], 0
        for i in chosen:
            landmarks_HPD = self._landmarks(ctx.segments[i], state.tables.setdefault(ctx.layer, {}), i)
            scanned += landmarks_HPD.numel() * landmarks_HPD.element_size() + _rebuilding(ctx.segments[i])
            logits.append(self._logits(ctx, ctx.segments[i], landmarks_HPD))
        score_HP = torch.cat(logits, 2).softmax(2).amax(1)
        widths = [one.shape[2] for one in logits]
        if self.raw:
            last = (ctx.segments[-1].lengths.long() - 1).unsqueeze(1)
            score_HP.scatter_(1, sum(widths[:-1]) + last.div(self.chunk, rounding_mode="floor"), torch.inf)
        # A head that holds less than another has nothing there.
        score_HP = score_HP.masked_fill(torch.cat(logits, 2)[:, 0] == -torch.inf, -torch.inf)
        lists = choose(score_HP, widths, self.keep // self.chunk, backend=ctx.backend)
        selections: list[Selection | None] = [None] * len(ctx.segments)
        for i, one in zip(chosen, lists, strict=True):
            selections[i] = replace(one, page=self.chunk)
        return View(selections=tuple(selections), scanned=scanned)

    def observe(self, ctx: DecodeLayer, logits: Sequence[Tensor], state: LandmarksState) -> None:
        """Never called: no view asks for logits."""

    def state_bytes(self, state: LandmarksState) -> int:
        """Bytes of the landmarks that the part made; stored ones belong to the store."""
        return sum(table.rows.nbytes for tables in state.tables.values() for table in tables.values())

    def _landmarks(self, segment: Stored, tables: dict[int, PageTable], number: int) -> Tensor:
        """``[H, P, D]``; what lies behind a head's end is not valid."""
        stored, longest = _stored(segment), int(segment.lengths.max())
        if stored is not None and self.chunk == CHUNK:
            tables.pop(number, None)
            return stored[:, : longest // CHUNK]
        tables[number] = updated(tables.get(number), segment, self.chunk, _mean)
        return tables[number].rows[:, : -(-longest // self.chunk)]

    def _logits(self, ctx: DecodeLayer, segment: Stored, landmarks_HPD: Tensor) -> Tensor:
        """``[H, G, P]`` float32 scaled logits, ``-inf`` behind a head's end."""
        q_HGD = ctx.q.view(segment.heads, -1, ctx.q.shape[1])
        logits = (q_HGD @ landmarks_HPD.transpose(1, 2)).float() * ctx.spec.scale
        if ctx.spec.softcap is not None:
            logits = ctx.spec.softcap * (logits / ctx.spec.softcap).tanh()
        held_H = -(-segment.lengths.long() // self.chunk)
        pages = torch.arange(landmarks_HPD.shape[1])
        return logits.masked_fill((pages >= held_H[:, None]).unsqueeze(1).to(logits.device), -torch.inf)


def _stored(segment: Stored) -> Tensor | None:
    """Landmarks that lie beside the entries, ``[H, C / CHUNK, D]``."""
    if not isinstance(segment, EncodedSegment):
        return None
    return next((row for row, p in zip(segment.rows, segment.planes, strict=True) if p.index), None)


def _rebuilding(segment: Stored) -> int:
    """Bytes of the right factors, which every step reads whole to rebuild keys."""
    if not isinstance(segment, EncodedSegment) or segment.factors is None:
        return 0
    return segment.factors.right.numel() * segment.factors.right.element_size()


def _mean(k: Tensor) -> Tensor:
    return k.float().mean(-2).to(k.dtype)
