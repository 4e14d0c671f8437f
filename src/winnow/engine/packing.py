"""The packed batch of a step: new tokens of several sequences, one after the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.engine.attend import Slice
from winnow.engine.run import Run

__all__ = ["Packed", "pack"]


@dataclass(kw_only=True)
class Packed:
    """What goes through the model in one step.

    Attributes
    ----------
    runs : list of Run
        Those that advance.
    slices : list of Slice
        The rows of each of them.
    tokens, positions : list of int
    rows : list of int
        Last row of every sequence that is computed whole with this step: where a token is drawn.
    read : list of int
        All rows whose result somebody reads once all layers are through; ``rows`` are among them.
    """

    runs: list[Run] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[N]`` token ids, ``[N]`` positions, ``[M]`` rows and ``[P]`` rows that are read, int64."""
        ids_N, positions_N, rows_M, read_P = (
            torch.tensor(values, dtype=torch.long, device=device)
            for values in (self.tokens, self.positions, self.rows, self.read)
        )
        return ids_N, positions_N, rows_M, read_P


def pack(runs: Seq[Run], shares: Seq[int]) -> Packed:
    """The next ``shares[i]`` tokens of ``runs[i]``; a run with none is left out."""
    packed = Packed()
    for run, count in zip(runs, shares, strict=True):
        if count == 0:
            continue
        first, at = len(packed.tokens), run.sequence.store.length
        final = at + count == len(run.sequence.tokens)
        read = first + _read_from(run, at, at + count) - at
        packed.runs.append(run)
        packed.slices.append(
            Slice(
                sequence=run.sequence,
                stats=run.result.stats,
                first=first,
                last=first + count,
                read=read,
                prompt=run.prompting,
                final=final,
            )
        )
        packed.tokens += run.sequence.tokens[at : at + count]
        packed.positions += range(at, at + count)
        if final:
            packed.rows.append(first + count - 1)
        packed.read += range(read, first + count)
    return packed


def _read_from(run: Run, begin: int, end: int) -> int:
    """First position from ``begin`` to ``end - 1`` that is read once all layers are through, else ``end``."""
    if not run.prompting:
        return begin
    sequence, whole = run.sequence, len(run.sequence.tokens)
    wanted = whole - 1
    if sequence.compression is not None:
        wanted = min(wanted, sequence.compression.looks_from(whole))
    if (generation := sequence.recipe.generation) is not None:
        # A pattern is computed from the queries of a whole chunk multiple.
        wanted = 0 if generation.tail is None else wanted - wanted % generation.chunk_multiple
    return min(max(wanted, begin), end)
