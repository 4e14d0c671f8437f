"""Page bounds: read the pages whose keys could match the query best, by their extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from winnow._check import integer
from winnow.kernels.decode import decode
from winnow.loading.lists import Stored, choose
from winnow.loading.page_table import PageTable, updated
from winnow.loading.protocol import DecodeLayer
from winnow.types import EVERYTHING, AttentionSpec, Needs, Segment, View

__all__ = ["PageBounds"]


@dataclass
class PageBoundsState:
    """The tables of every layer that chooses, one per segment."""

    tables: dict[int, list[PageTable]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PageBounds:
    """Quest: query-aware choice of pages by an upper bound of their logits.

    Source: Quest (arXiv 2406.10774), ``evaluation/quest_attention.py``.

    For a page with elementwise extremes ``kmin`` and ``kmax`` of its rotated keys, no logit exceeds
    ``sum over channels of max(q kmin, q kmax)``. A step reads the pages with the largest bound. As
    ``max(q, 0) kmax + min(q, 0) kmin`` the bound of all pages is one matrix product.

    Attributes
    ----------
    keep : int
        Entries per KV head that a step reads, in whole pages; at least three pages are read.
    page : int
        Entries of a page.
    dense_layers : int
        First layers that read everything.

    Notes
    -----
    Deviations from the official code:

    - One list of pages per KV head, by the largest bound in its group of query heads, so that a page is
      loaded once for all of them. The code expands keys and chooses per query head.
    - The page that holds the current token is always read. The evaluation code pads it and lets it
      compete.
    - Pages are counted inside a stored segment: after an eviction they hold neighbours among what stayed.
    - Layers with a sliding window of the model read their window.
    """

    keep: int = 1024
    page: int = 16
    dense_layers: int = 2

    exempt = {  # noqa: RUF012 (read by the contract suite)
        "segments": "pages are counted inside a segment, so where one begins moves them",
    }

    def __post_init__(self) -> None:
        integer("page-bounds", "keep", self.keep, 1)
        integer("page-bounds", "page", self.page, 1)
        integer("page-bounds", "dense_layers", self.dense_layers, 0, "layers")

    @property
    def needs(self) -> Needs:
        """Nothing: the part keeps its own bounds."""
        return Needs()

    @property
    def pages(self) -> int:
        """Pages that a step reads."""
        return max(3, self.keep // self.page)

    def check(self, layers: int) -> None:
        """Any number of layers will do."""

    def state(self) -> PageBoundsState:
        """Empty state for one sequence."""
        return PageBoundsState()

    def select(self, ctx: DecodeLayer, state: PageBoundsState) -> View:
        """Everything where it is no more than the budget, else the pages with the largest bounds."""
        if ctx.layer < self.dense_layers or ctx.spec.window is not None:
            return EVERYTHING
        held = torch.stack([segment.lengths for segment in ctx.segments]).sum(0)
        if int(held.max()) <= self.pages * self.page:
            return EVERYTHING
        tables = state.tables.setdefault(ctx.layer, [])
        del tables[len(ctx.segments) :]
        scores, scanned = [], 0
        for i, segment in enumerate(ctx.segments):
            table = updated(tables[i] if i < len(tables) else None, segment, self.page, _extremes)
            tables[i : i + 1] = [table]
            score_HP, read = self._score(ctx, segment, table)
            scores.append(score_HP)
            scanned += read
        last = ctx.segments[-1].lengths.long() - 1
        scores[-1].scatter_(1, torch.div(last, self.page, rounding_mode="floor")[:, None], torch.inf)
        widths = [one.shape[1] for one in scores]
        listed = choose(torch.cat(scores, 1), widths, self.pages, backend=ctx.backend)
        return View(selections=tuple(replace(one, page=self.page) for one in listed), scanned=scanned)

    def observe(self, ctx: DecodeLayer, logits: Sequence[Tensor], state: PageBoundsState) -> None:
        """Never called: no view asks for logits."""

    def state_bytes(self, state: PageBoundsState) -> int:
        """Bytes of the bounds, with their reserve."""
        return sum(table.rows.nbytes for tables in state.tables.values() for table in tables)

    def _score(self, ctx: DecodeLayer, segment: Stored, table: PageTable) -> tuple[Tensor, int]:
        """``[H, P]`` float32 bounds on the scaled logits, ``-inf`` behind a head's end, and bytes read."""
        pages = -(-max(table.done) // self.page)
        bounds_HPE = table.rows[:, :pages]
        q_HGD = ctx.q.view(segment.heads, -1, ctx.q.shape[1])
        q_HGE = torch.cat([q_HGD.clamp(min=0), q_HGD.clamp(max=0)], 2)
        # The decode kernel's logits over the bounds as keys: PyTorch's product of a few bfloat16 rows is
        # several times slower.
        H, G, _ = q_HGE.shape
        rows = Segment(k=bounds_HPE, v=bounds_HPE, lengths=torch.full((H,), pages, dtype=torch.int32))
        products = decode(
            q_HGE.flatten(0, 1),
            rows,
            spec=AttentionSpec(scale=ctx.spec.scale),
            position=pages,
            want_logits=True,
            backend=ctx.backend,
        ).logits
        assert products is not None
        score_HP = products.view(H, G, pages).amax(1)
        if segment.bias is not None:
            bias = segment.bias[:, : max(table.done)]
            padded = functional.pad(bias, (0, pages * self.page - bias.shape[1]), value=-torch.inf)
            score_HP += padded.view(segment.heads, pages, self.page).amax(2)
        if min(table.done) < max(table.done):
            held = torch.tensor([-(-n // self.page) for n in table.done])
            score_HP = score_HP.masked_fill(torch.arange(pages) >= held[:, None], -torch.inf)
        return score_HP, bounds_HPE.numel() * bounds_HPE.element_size()


def _extremes(k: Tensor) -> Tensor:
    return torch.cat([k.amax(-2), k.amin(-2)], -1)
