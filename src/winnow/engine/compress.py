"""Carry out a recipe's compression on a sequence, at the end of a prefill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from winnow.compression.protocol import Compress
from winnow.engine.request import Stats
from winnow.engine.sequence import Sequence
from winnow.types import AttentionSpec, Observation, Scores

__all__ = ["compress", "uninterrupted"]


def compress(sequence: Sequence, specs: tuple[AttentionSpec, ...], stats: Stats) -> None:
    """Score, allocate, plan and apply, layer by layer where the budget allows it.

    Nothing changes in the store until every decision of its scope is made, and a Ctrl-C that
    arrives while plans are carried out is delivered afterwards: layers never disagree.

    Parameters
    ----------
    sequence : Sequence
        Its prefill has just ended; the recipe has a compression.
    specs : tuple of AttentionSpec
        One per layer.
    stats : Stats
        Gets the entries before and after.
    """
    compression = sequence.recipe.compression
    assert compression is not None
    store = sequence.store
    stats.entries_before += _entries(sequence)
    layers = list(range(store.layers))
    scores = [_score(compression, sequence, layer, specs[layer]) for layer in layers]
    groups = [[layer] for layer in layers] if compression.budget.scope == "layer" else [layers]
    plans = {}
    for group in groups:
        budgets = compression.budget.allocate([scores[i] for i in group], group, store.layers)
        for layer, budget in zip(group, budgets, strict=True):
            plans[layer] = compression.act.plan(scores[layer], budget)
    with uninterrupted():
        for layer, plan in plans.items():
            store.apply(layer, plan)
    sequence.pure, sequence.compressed = 0, store.length
    stats.entries_after += _entries(sequence)


def _score(compression: Compress, sequence: Sequence, layer: int, spec: AttentionSpec) -> Scores:
    queries = sequence.take_queries(layer)
    positions = None
    if queries is not None:
        end = sequence.store.length
        positions = torch.arange(end - queries.shape[0], end, dtype=torch.int32)
    return compression.score.score(
        Observation(
            layer=layer,
            spec=spec,
            segment=sequence.store.decoded(layer),
            queries=queries,
            query_positions=positions,
        )
    )


def _entries(sequence: Sequence) -> int:
    store = sequence.store
    return sum(sum(store.lengths(layer)) for layer in range(store.layers))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C while the body runs; deliver it at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    earlier = signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
    if arrived and callable(earlier):
        earlier(*arrived[-1])
