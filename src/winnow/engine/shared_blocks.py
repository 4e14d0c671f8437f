"""Blocks of entries that several workers read and write, each from its own place (Hogwild! Inference).

A block holds keys that are turned as if it began at position 0. Where it lies for a worker is a matter of
that worker's view: instead of turning all keys of a block on to there, the worker's query is turned back
by as much. Attention over the blocks of a view is merged exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.request import Stats
from winnow.kernels.backend import Backend
from winnow.kernels.decode import decode
from winnow.kernels.merge import add_sinks, merge
from winnow.kernels.prefill import prefill
from winnow.store.codecs import EncodedSegment
from winnow.store.sequence import SequenceStore
from winnow.types import AttentionSpec, LanguageModel, Partial, Segment

__all__ = ["Block", "View", "forward"]


class Block:
    """Consecutive tokens and their entries, at positions counted from the block's begin.

    Attributes
    ----------
    tokens : list of int
    store : SequenceStore
    """

    def __init__(self, model: LanguageModel) -> None:
        self.tokens: list[int] = []
        self.store = SequenceStore(
            layers=model.layers,
            heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            capacity=model.max_length,
            device=str(model.device),
        )

    def __len__(self) -> int:
        return self.store.length

    def move_into(self, other: Block, model: LanguageModel) -> None:
        """Append everything to the end of another block, keys turned on to there, and be empty."""
        n = len(self)
        if n == 0:
            return
        at_T = torch.arange(len(other), len(other) + n, dtype=torch.int32)
        by_T = torch.full((n,), len(other), dtype=torch.int32)
        for layer in range(self.store.layers):
            held, rotary = self.store.decoded(layer), model.rotary(layer)
            k_HTD = held.k[:, :n]
            if rotary is not None:
                k_HTD = rotary.turn(k_HTD, by_T)
            other.store.append(layer, k_HTD.transpose(0, 1), held.v[:, :n].transpose(0, 1), at_T)
        other.store.advance(n)
        other.tokens += self.tokens
        self.clear()

    def clear(self) -> None:
        """Drop all entries."""
        self.store.truncate(0)
        self.tokens = []

    def nbytes(self) -> int:
        """Measured bytes of the entries."""
        return sum(self.store.bytes().values())


class View:
    """The blocks that one worker sees, in its order; it writes the last one.

    Parameters
    ----------
    blocks : sequence of Block
        No block twice. Views may share all blocks but the last.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        assert len({id(block) for block in blocks}) == len(blocks), "a block occurs once in a view"
        self.blocks = list(blocks)

    @property
    def own(self) -> Block:
        """The block that the worker writes."""
        return self.blocks[-1]

    @property
    def length(self) -> int:
        """Tokens that the worker sees."""
        return sum(map(len, self.blocks))


@torch.inference_mode()
def forward(
    model: LanguageModel,
    views: Sequence[View],
    tokens: Sequence[Sequence[int]],
    *,
    stats: Stats | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Let every worker read new tokens at the end of its own block, all in one packed batch.

    Every worker sees what the others write in this very call: there is no order between workers.
    Inside the tokens of one worker attention is causal.

    Parameters
    ----------
    model : LanguageModel
    views : sequence of View
        One per worker, writing different blocks.
    tokens : sequence of sequence of int
        At least one new token per worker.
    stats : Stats or None
        Gets the scores and the bytes read, all workers together.
    backend : Backend

    Returns
    -------
    Tensor
        ``[W, V]`` logits behind the last token of every worker.

    Raises
    ------
    ValueError
        If a view would outgrow the model, or the model's positions cannot be moved.
    """
    own = [view.own for view in views]
    assert len({id(block) for block in own}) == len(own), "every worker writes a block of its own"
    step = _Step(model, views, [len(new) for new in tokens], stats or Stats(), backend)
    longest = max(int(at_T[-1]) for at_T in step.positions)
    if longest >= model.max_length:
        raise ValueError(
            f"a worker would see {longest + 1} tokens and {model.name} takes {model.max_length}; "
            "end its steps earlier or give it a smaller view"
        )
    logits = model.forward(
        torch.tensor([token for new in tokens for token in new], device=model.device),
        torch.cat(step.positions).long().to(model.device),
        torch.tensor([len(new) for new in tokens], device=model.device).cumsum(0) - 1,
        step,
    )
    for block, new in zip(own, tokens, strict=True):
        block.store.advance(len(new))
        block.tokens += new
    return logits


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """A block, and who reads it together.

    Attributes
    ----------
    block : Block
    readers : Tensor
        ``[R]`` int64, numbered among the workers that advance by one token.
    by : Tensor
        ``[R]`` int64 positions by which their queries are turned.
    """

    block: Block
    readers: Tensor
    by: Tensor


class _Step:
    """The attention callable of one forward pass.

    Attributes
    ----------
    positions : list of Tensor
        Per worker ``[T]`` int32 positions of its new tokens in its own view.
    """

    def __init__(
        self,
        model: LanguageModel,
        views: Sequence[View],
        counts: list[int],
        stats: Stats,
        backend: Backend,
    ) -> None:
        self._model = model
        self._views = views
        self._stats = stats
        self._backend = backend
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self._rows = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        # Lengths when everybody has written: where a block lies depends on what is written before it.
        grown = {id(view.own): n for view, n in zip(views, counts, strict=True)}
        self._offsets: list[list[int]] = []
        self.positions: list[Tensor] = []
        for view, n in zip(views, counts, strict=True):
            lengths = [len(block) + grown.get(id(block), 0) for block in view.blocks]
            self._offsets.append([sum(lengths[:i]) for i in range(len(lengths))])
            end = sum(lengths)
            self.positions.append(torch.arange(end - n, end, dtype=torch.int32))
        # New keys are stored as if their block began at 0.
        self._own = torch.cat(
            [torch.full((n,), -offsets[-1]) for n, offsets in zip(counts, self._offsets, strict=True)]
        )
        self._single = [worker for worker, n in enumerate(counts) if n == 1]
        self._single_rows = torch.tensor([self._rows[worker].start for worker in self._single])
        self._shared = self._readers()

    def _readers(self) -> list[_Shared]:
        """Every block that holds something, with the workers of one token that see it."""
        seen: dict[int, tuple[Block, list[tuple[int, int]]]] = {}
        for reader, worker in enumerate(self._single):
            for block, offset in zip(self._views[worker].blocks, self._offsets[worker], strict=True):
                seen.setdefault(id(block), (block, []))[1].append((reader, -offset))
        writing = {id(view.own) for view in self._views}
        return [
            _Shared(block=block, readers=readers_R, by=by_R)
            for block, pairs in seen.values()
            if len(block) or id(block) in writing
            for readers_R, by_R in [torch.tensor(pairs).unbind(1)]
        ]

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """As ``types.Attend``: all workers write, then all read."""
        k_NHD = self._turned(layer, k_NHD, self._own)
        for rows, view in zip(self._rows, self._views, strict=True):
            at = len(view.own)
            at_T = torch.arange(at, at + rows.stop - rows.start, dtype=torch.int32)
            view.own.store.append(layer, k_NHD[rows], v_NHD[rows], at_T)
        # A window ends at another entry for each worker, so those layers are read one by one.
        together = self._single if spec.window is None else []
        out_NHD = torch.empty_like(q_NHD)
        if together:
            partial = self._attend_together(layer, q_NHD, spec)
            out_NHD[self._single_rows] = _with_sinks(partial, spec).out.to(q_NHD.dtype)
        for worker, rows in enumerate(self._rows):
            if worker not in together:
                partial = self._attend_alone(layer, q_NHD[rows], worker, spec)
                out_NHD[rows] = _with_sinks(partial, spec).out.to(q_NHD.dtype)
        return out_NHD

    def _attend_together(self, layer: int, q_NHD: Tensor, spec: AttentionSpec) -> Partial:
        """``[W, H * G, D]``: attention of every worker that advances by one token, over all it sees.

        The workers of a block stand beside the query heads of a KV head: to the kernel they are one
        larger group that shares its entries. All of a block lies before the tokens that look at it.
        """
        readers_P = torch.cat([one.readers for one in self._shared])
        by_P = torch.cat([one.by for one in self._shared])
        near_PHD = self._turned(layer, q_NHD[self._single_rows[readers_P]], by_P)
        workers, dim = len(self._single), q_NHD.shape[2]
        near = torch.split(near_PHD, [len(one.readers) for one in self._shared])
        partials = []
        for shared, q_RHD in zip(self._shared, near, strict=True):
            for segment in shared.block.store.segments(layer):
                q_HRGD = q_RHD.view(len(q_RHD), segment.heads, -1, dim).transpose(0, 1)
                for tile in segment.tiles(1024):
                    partial = decode(
                        q_HRGD.reshape(-1, dim),
                        tile,
                        spec=spec,
                        position=self._model.max_length,
                        backend=self._backend,
                    )
                    self._count(segment, partial)
                    partials.append(_by_worker(partial, shared.readers, workers, segment.heads))
        return merge(partials)

    def _attend_alone(self, layer: int, q_THD: Tensor, worker: int, spec: AttentionSpec) -> Partial:
        """``[T, H * G, D]``: attention of one worker's tokens, over all it sees."""
        partials = []
        positions_T = self.positions[worker]
        for block, offset in zip(self._views[worker].blocks, self._offsets[worker], strict=True):
            if not (segments := block.store.segments(layer)):
                continue
            q_near = self._turned(layer, q_THD, torch.full((len(q_THD),), -offset))
            for segment in segments:
                partial = prefill(
                    q_near,
                    segment.decode(),
                    spec=spec,
                    query_positions=positions_T - offset,
                    backend=self._backend,
                )
                self._count(segment, partial)
                partials.append(partial)
        return merge(partials)

    def _count(self, segment: Segment | EncodedSegment, partial: Partial) -> None:
        self._stats.decode_score_entries += partial.pairs
        # Query heads of a KV head share each load, and so do the rows of a call.
        seen = partial.pairs * segment.heads // partial.lse.shape[1]
        entries = min(seen, int(segment.lengths.sum()))
        for tier, size in segment.reads.items():
            kind = f"{tier}/{segment.codec}"
            self._stats.bytes_read[kind] = self._stats.bytes_read.get(kind, 0) + entries * size

    def _turned(self, layer: int, x_NHD: Tensor, by_N: Tensor) -> Tensor:
        rotary = self._model.rotary(layer)
        return x_NHD if rotary is None else rotary.turn(x_NHD.transpose(0, 1), by_N).transpose(0, 1)


def _by_worker(partial: Partial, readers_R: Tensor, workers: int, heads: int) -> Partial:
    """Rows ``[W, H * G, D]`` of a result in which readers were part of the groups; nothing for others."""
    count, dim = len(readers_R), partial.out.shape[2]
    out_RHD = partial.out.view(heads, count, -1, dim).transpose(0, 1).reshape(count, -1, dim)
    lse_RH = partial.lse.view(heads, count, -1).transpose(0, 1).reshape(count, -1)
    if count == workers:
        return Partial(out=out_RHD, lse=lse_RH, pairs=partial.pairs)
    out_WHD = out_RHD.new_zeros(workers, *out_RHD.shape[1:])
    lse_WH = lse_RH.new_full((workers, lse_RH.shape[1]), -torch.inf)
    out_WHD[readers_R], lse_WH[readers_R] = out_RHD, lse_RH
    return Partial(out=out_WHD, lse=lse_WH, pairs=partial.pairs)


def _with_sinks(partial: Partial, spec: AttentionSpec) -> Partial:
    return partial if spec.sinks is None else add_sinks(partial, spec.sinks)
