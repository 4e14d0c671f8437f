"""Blocks of entries that several workers read and write, each from its own place (Hogwild! Inference).

A block holds keys that are turned as if it began at position 0. Where it lies for a worker is a matter of
that worker's view: instead of turning all keys of a block on to there, the worker's query is turned back
by as much. Attention over the blocks of a view is merged exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.decode import decode
from winnow.kernels.merge import add_sinks, merge
from winnow.kernels.prefill import prefill
from winnow.store.sequence import SequenceStore
from winnow.types import AttentionSpec, LanguageModel, Partial

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
    step = _Step(model, views, [len(new) for new in tokens], backend)
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


class _Step:
    """The attention callable of one forward pass.

    Attributes
    ----------
    positions : list of Tensor
        Per worker ``[T]`` int32 positions of its new tokens in its own view.
    """

    def __init__(
        self, model: LanguageModel, views: Sequence[View], counts: list[int], backend: Backend
    ) -> None:
        self._model = model
        self._views = views
        self._backend = backend
        self._counts = counts
        # Lengths when everybody has written: where a block lies depends on what is written before it.
        grown = {id(view.own): n for view, n in zip(views, counts, strict=True)}
        self._offsets: list[list[int]] = []
        self.positions: list[Tensor] = []
        for view, n in zip(views, counts, strict=True):
            lengths = [len(block) + grown.get(id(block), 0) for block in view.blocks]
            self._offsets.append([sum(lengths[:i]) for i in range(len(lengths))])
            end = sum(lengths)
            self.positions.append(torch.arange(end - n, end, dtype=torch.int32))

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """As ``types.Attend``: all workers write, then all read."""
        rows, first = [], 0
        for n in self._counts:
            rows.append(slice(first, first + n))
            first += n
        for of, view, offsets in zip(rows, self._views, self._offsets, strict=True):
            n = of.stop - of.start
            at_T = torch.arange(len(view.own), len(view.own) + n, dtype=torch.int32)
            view.own.store.append(layer, self._turned(layer, k_NHD[of], -offsets[-1]), v_NHD[of], at_T)
        return torch.cat(
            [
                self._attend(layer, q_NHD[of], view, offsets, at_T, spec).out.to(q_NHD.dtype)
                for of, view, offsets, at_T in zip(
                    rows, self._views, self._offsets, self.positions, strict=True
                )
            ]
        )

    def _attend(
        self,
        layer: int,
        q_THD: Tensor,
        view: View,
        offsets: list[int],
        positions_T: Tensor,
        spec: AttentionSpec,
    ) -> Partial:
        partials = []
        for block, offset in zip(view.blocks, offsets, strict=True):
            segments = block.store.segments(layer)
            if not segments:
                continue
            q_near = self._turned(layer, q_THD, -offset)
            at_T = positions_T - offset
            for segment in segments:
                if q_THD.shape[0] == 1:
                    for tile in segment.tiles(1024):
                        partials.append(
                            decode(q_near[0], tile, spec=spec, position=int(at_T[0]), backend=self._backend)
                        )
                else:
                    partials.append(
                        prefill(
                            q_near, segment.decode(), spec=spec, query_positions=at_T, backend=self._backend
                        )
                    )
        partial = merge(partials)
        return partial if spec.sinks is None else add_sinks(partial, spec.sinks)

    def _turned(self, layer: int, x_THD: Tensor, by: int) -> Tensor:
        rotary = self._model.rotary(layer)
        if by == 0 or rotary is None:
            return x_THD
        by_T = torch.full((x_THD.shape[0],), by, dtype=torch.int32)
        return rotary.turn(x_THD.transpose(0, 1), by_T).transpose(0, 1)
