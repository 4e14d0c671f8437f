"""Tri-shape: A-shape for the prompt, full attention for its last tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from winnow._check import integer
from winnow.generation.protocol import PrefillLayer
from winnow.kernels.prefill import prefill
from winnow.types import Dense, Form, Needs, Partial, Pattern, Segment, Window

__all__ = ["TriShape"]


@dataclass(frozen=True, kw_only=True)
class TriShape:
    """A static pattern: A-shape, but the last ``last`` tokens of the prompt read everything.

    Source: SCBench (arXiv 2412.10319); ``minference/ops/streaming_kernel.py``
    (``tri_shape_kernel``) of microsoft/MInference.

    Attributes
    ----------
    init : int
        First positions of the sequence that every query reads (``n_init``), at least 0.
    local : int
        Last positions that a query reads, its own included (``n_local``), at least 1.
    last : int
        Last tokens of the prompt that read everything (``n_last``), at least 1.

    Notes
    -----
    Deviations from the official code:

    - The last tokens are those of the *prompt*, whatever its chunks, so chunked prefill equals
      whole prefill (the code takes the last of every call).
    - The dense rows go through the same kernel; the code builds their scores as a tensor.

    The entries of the last tokens depend on where the prompt ended, so they are not reusable
    under a longer prompt: :attr:`tail` says so to the engine.
    """

    init: int = 128
    local: int = 3968
    last: int = 100

    def __post_init__(self) -> None:
        integer("tri-shape", "init", self.init, 0, "tokens")
        integer("tri-shape", "local", self.local, 1, "tokens")
        integer("tri-shape", "last", self.last, 1, "tokens")

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
        """Tokens at the end of a prompt that are computed otherwise than they would be inside one."""
        return self.last

    def state(self) -> None:
        """No state."""

    def patterns(self, ctx: PrefillLayer, state: None) -> tuple[Pattern, ...]:
        """Window, dense, or the window above and everything for the last rows."""
        rows = ctx.q.shape[0]
        cut = int((ctx.query_positions < ctx.prompt_end - self.last).sum())
        window = Window(init=self.init, local=self.local)
        if cut in (0, rows):
            return tuple(Pattern(form=window if cut else Dense()) for _ in ctx.segments)
        return tuple(
            Pattern(
                form=None,
                done=_stack(
                    _rows(ctx, segment, slice(0, cut), window), _rows(ctx, segment, slice(cut, rows), Dense())
                ),
            )
            for segment in ctx.segments
        )


def _rows(ctx: PrefillLayer, segment: Segment, rows: slice, form: Form) -> Partial:
    return prefill(
        ctx.q[rows],
        segment,
        spec=ctx.spec,
        query_positions=ctx.query_positions[rows],
        form=form,
        backend=ctx.backend,
    )


def _stack(above: Partial, below: Partial) -> Partial:
    """The results of different rows over the same entries, one above the other."""
    return Partial(
        out=torch.cat([above.out, below.out]),
        lse=torch.cat([above.lse, below.lse]),
        pairs=above.pairs + below.pairs,
    )
