"""A-shape: every query reads the first tokens and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from winnow._check import integer
from winnow.generation.protocol import PrefillLayer
from winnow.types import Needs, Pattern, Window

__all__ = ["AShape"]


@dataclass(frozen=True, kw_only=True)
class AShape:
    """A static pattern: entry ``j`` is visible to query ``i`` iff ``j <= i`` and
    (``j < init`` or ``i - j < local``), in every layer and head.

    Source: the prefill pattern of StreamingLLM (arXiv 2309.17453) as used by MInference
    (arXiv 2407.02490) and SCBench (arXiv 2412.10319), ``minference/ops/streaming_kernel.py``.

    Attributes
    ----------
    init : int
        First positions of the sequence that every query reads (``n_init``), at least 0.
    local : int
        Last positions that a query reads, its own included (``n_local``), at least 1.

    Notes
    -----
    Deviations: none in the rule. True positions are kept, unlike StreamingLLM's cache, which
    numbers the kept entries anew. A sink inside the window counts once.
    """

    init: int = 128
    local: int = 3968

    def __post_init__(self) -> None:
        integer("a-shape", "init", self.init, 0, "tokens")
        integer("a-shape", "local", self.local, 1, "tokens")

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs()

    @property
    def chunk_multiple(self) -> int:
        """Any chunk borders give the same result: the rule reads positions only."""
        return 1

    @property
    def tail(self) -> int:
        """None: the end of a prompt is computed like its inside."""
        return 0

    def state(self) -> None:
        """No state."""

    def patterns(self, ctx: PrefillLayer, state: None) -> tuple[Pattern, ...]:
        """The same window over every segment."""
        form = Window(init=self.init, local=self.local)
        return tuple(Pattern(form=form) for _ in ctx.segments)
