"""Repair: fill a sequence with chunks that were computed apart, and compute some tokens again.

The chunks' keys are turned to where they stand now. Then the layers are walked with a set of tokens that
shrinks as the recipe's part says: what a layer computes of these replaces what was stored, and they attend
to everything at or before their own position, computed or stored. What follows the chunks is not touched
here: it is prefilled as any prompt is, over the entries that lie here then. (As no chunk token can see it,
this gives the same as computing both together.)
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.request import Stats
from winnow.engine.sequence import Sequence
from winnow.kernels.backend import Backend
from winnow.kernels.merge import add_sinks, merge
from winnow.kernels.prefill import prefill
from winnow.retrieval.protocol import Chunk, ChunkPart, ChunkPool
from winnow.store.codecs import codec_named
from winnow.store.sequence import SequenceStore
from winnow.types import AttentionSpec, LanguageModel

__all__ = ["Division", "Repair"]

Compute = Callable[[list[int], Stats], SequenceStore]
"""Prefills tokens as a sequence of their own and returns its store, which the caller closes."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a prompt divides into chunks that may be reused, and a rest that is computed.

    Attributes
    ----------
    lengths : tuple of int
        Tokens of each chunk, from the prompt's first token on; the rest has at least one token.
    begin : tuple of int
        Tokens that stand before a chunk while it is computed apart (a begin token); the first chunk
        holds its own.
    """

    lengths: tuple[int, ...]
    begin: tuple[int, ...] = ()

    def check(self, tokens: int) -> None:
        """Raise ``ValueError`` where a prompt of so many tokens does not divide like that."""
        if any(n < 1 for n in self.lengths):
            raise ValueError("a chunk is empty; leave empty chunks out")
        if sum(self.lengths) >= tokens:
            raise ValueError(
                "nothing follows the chunks; give what is to be computed last, such as a question"
            )


@dataclass(frozen=True, kw_only=True)
class _Placed:
    chunk: Chunk
    position: int  # of its first token in the prompt


class Repair:
    """Chunk reuse on one model; holds the pool.

    Parameters
    ----------
    model : LanguageModel
    part : ChunkPart
    compute : callable
        How a chunk that the pool does not have is computed.
    rows : int
        Most tokens that pass through a layer at a time.
    dense : bool
        ``compute`` computes all scores, so that a chunk in front is what the prompt would have.
    backend : Backend

    Raises
    ------
    ValueError
        If the model's layers cannot be walked or its keys not be moved, by name.
    """

    def __init__(
        self,
        model: LanguageModel,
        part: ChunkPart,
        compute: Compute,
        *,
        rows: int,
        dense: bool = True,
        backend: Backend = "auto",
    ) -> None:
        part.check(model.layers)
        codec_named(part.codec).planes(model.head_dim, model.dtype)
        self.part = part
        self.pool: ChunkPool = part.pool()
        self._model = model
        self._walk = model.walk()
        self._rotaries = [model.rotary(layer) for layer in range(model.layers)]
        self._compute = compute
        self._rows = rows
        self._dense = dense
        self._backend = backend

    # ------------------------------------------------------------------ the whole

    def run(self, sequence: Sequence, division: Division, namespace: str, stats: Stats) -> None:
        """Give an empty sequence the entries of its chunks.

        Parameters
        ----------
        sequence : Sequence
            Holds its tokens and no entries yet.
        division : Division
            Of these tokens.
        namespace : str
            Requests of other name spaces share no chunk.
        stats : Stats
            Gets the tokens that were reused, exactly or not, and those that were repaired.
        """
        assert sequence.store.length == 0, "chunks come first in a sequence"
        with ExitStack() as held, torch.inference_mode():
            placed = []
            at = 0
            for number, tokens in enumerate(division.lengths):
                begin = division.begin if number else ()
                chunk = self._chunk(
                    sequence.tokens[at : at + tokens], begin, namespace, stats, exact=self._exact(at)
                )
                held.callback(self.pool.release, chunk)
                placed.append(_Placed(chunk=chunk, position=at))
                at += tokens
            lead = division.lengths[0] if division.lengths and self._exact(0) else 0
            _Blending(self, sequence, placed, lead, stats).run()
            sequence.store.advance(at)
            sequence.pure = lead

    def missing(self, tokens: Seq[int], division: Division, namespace: str) -> list[int]:
        """How many tokens :meth:`run` would compute apart, for each chunk that the pool does not have."""
        found, at = [], 0
        for number, count in enumerate(division.lengths):
            begin = division.begin if number else ()
            if not self.pool.has(tokens[at : at + count], begin, namespace):
                found.append(len(begin) + count)
            at += count
        return found

    def _exact(self, position: int) -> bool:
        """Whether a chunk's entries are those of the prompt: nothing before them, left out or rounded."""
        return position == 0 and self._dense and self.part.codec == "raw"

    def _chunk(
        self, tokens: list[int], begin: tuple[int, ...], namespace: str, stats: Stats, *, exact: bool
    ) -> Chunk:
        found = self.pool.find(tokens, begin, namespace)
        if found is None:
            store = self._compute([*begin, *tokens], stats)
            try:
                return self.pool.keep(tokens, begin, namespace, store)
            except BaseException:
                store.close()
                raise
        stats.tokens_computed -= len(tokens)
        if exact:
            stats.tokens_reused += len(tokens)
        else:
            stats.tokens_approximate += len(tokens)
        return found


class _Blending:
    """One walk over the layers: tokens behind the exact lead are the region, numbered from 0."""

    def __init__(
        self, repair: Repair, sequence: Sequence, placed: list[_Placed], lead: int, stats: Stats
    ) -> None:
        self._model, self._part, self._walk = repair._model, repair.part, repair._walk
        self._rotaries, self._limit, self._backend = repair._rotaries, repair._rows, repair._backend
        self._store, self._placed, self._lead, self._stats = sequence.store, placed, lead, stats
        self._end = sum(one.chunk.tokens for one in placed)
        self._tokens = torch.tensor(sequence.tokens[lead : self._end], dtype=torch.long)

    def run(self) -> None:
        """Append the entries of every layer."""
        region = len(self._tokens)
        rows_N = torch.arange(region if self._part.repairs else 0)
        pieces = self._pieces(rows_N)
        hidden_NK = torch.empty(0)
        if len(rows_N):
            hidden_NK = self._walk.embed(self._tokens[rows_N], rows_N + self._lead)
        positions_S = torch.arange(self._end, dtype=torch.int32)
        for layer in range(self._model.layers):
            k_SHD, v_SHD = self._stored(layer)
            stay = None
            if len(rows_N):
                new = self._keys_values(layer, hidden_NK, pieces)
                at_N = rows_N + self._lead
                if self._part.chooses(layer):
                    stay = self._part.choose(layer, new, (k_SHD[at_N], v_SHD[at_N]), region)
                k_SHD[at_N], v_SHD[at_N] = new
            self._store.append(layer, k_SHD, v_SHD, positions_S)
            if stay is not None:
                rows_N, hidden_NK = rows_N[stay], hidden_NK[stay]
                pieces = self._pieces(rows_N)
            if len(rows_N) and layer < self._model.layers - 1:
                hidden_NK = _joined(
                    [
                        self._walk.layer(layer, hidden_NK[piece], at_n, self._attend(at_n))
                        for piece, at_n in pieces
                    ]
                )
        self._stats.tokens_repaired += len(rows_N)

    def _pieces(self, rows_N: Tensor) -> list[tuple[slice, Tensor]]:
        """Rows that pass through a layer together, and their positions."""
        cuts = [slice(i, min(i + self._limit, len(rows_N))) for i in range(0, len(rows_N), self._limit)]
        return [(cut, rows_N[cut] + self._lead) for cut in cuts]

    def _keys_values(
        self, layer: int, hidden_NK: Tensor, pieces: list[tuple[slice, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        parts = [self._walk.keys_values(layer, hidden_NK[piece], at_n) for piece, at_n in pieces]
        return _joined([k for k, _ in parts]), _joined([v for _, v in parts])

    def _stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[S, H, D]`` of all chunks, as stored but at their new positions; copies."""
        rotary = self._rotaries[layer]
        keys, values = [], []
        for one in self._placed:
            k_HnD, v_HnD = _decoded(one.chunk, layer)
            by = one.position - one.chunk.start
            if rotary is not None and by:
                # Always from the stored original: turns in a chain would add up their roundings.
                k_HnD = rotary.turn(k_HnD, torch.full((one.chunk.tokens,), by, device=k_HnD.device))
            keys.append(k_HnD.transpose(0, 1))
            values.append(v_HnD.transpose(0, 1))
        return torch.cat(keys), torch.cat(values)

    def _attend(self, at_N: Tensor) -> Callable[[int, Tensor, Tensor, Tensor, AttentionSpec], Tensor]:
        """Attention of the rows at these positions over all entries; theirs are among them already."""
        positions_N = at_N.to(torch.int32)

        def attend(layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec) -> Tensor:
            partials = [
                prefill(
                    q_NHD, segment.decode(), spec=spec, query_positions=positions_N, backend=self._backend
                )
                for segment in self._store.segments(layer)
            ]
            self._stats.score_entries += sum(partial.pairs for partial in partials)
            merged = merge(partials)
            if spec.sinks is not None:
                merged = add_sinks(merged, spec.sinks)
            return merged.out.to(q_NHD.dtype)

        return attend


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _decoded(chunk: Chunk, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[H, n, D]`` of a chunk: its coded pages, and behind them what is left raw."""
    parts = [segment.decode() for segment in chunk.store.segments(layer)]
    sizes = [int(part.lengths[0]) for part in parts]  # every head holds every token
    return (
        _joined([part.k[:, :n] for part, n in zip(parts, sizes, strict=True)], 1),
        _joined([part.v[:, :n] for part, n in zip(parts, sizes, strict=True)], 1),
    )
