"""Tokens that are computed as a sequence of their own: chunks that a pool will hold."""

from __future__ import annotations

from collections.abc import Callable

import torch

from winnow.engine.attend import Slice, StepAttention
from winnow.engine.request import Stats
from winnow.engine.scheduler import Limits, share
from winnow.engine.sequence import Sequence
from winnow.kernels.backend import Backend
from winnow.recipe import Recipe
from winnow.store.sequence import SequenceStore
from winnow.types import LanguageModel

__all__ = ["prefilled"]


def prefilled(
    tokens: list[int],
    stats: Stats,
    *,
    room: Callable[[int], SequenceStore],
    model: LanguageModel,
    recipe: Recipe,
    limits: Limits,
    backend: Backend,
) -> SequenceStore:
    """The entries of tokens, under the generation of a recipe alone, in a store that the caller closes.

    Parameters
    ----------
    tokens : list of int
    stats : Stats
        Gets the score entries.
    room : callable
        Makes an empty store for so many tokens.
    model : LanguageModel
    recipe : Recipe
    limits : Limits
        Of the chunks in which they are computed.
    backend : Backend
    """
    generation = recipe.generation
    multiple = 1 if generation is None else generation.chunk_multiple
    store = room(len(tokens))
    sequence = Sequence(Recipe(generation=generation), store)
    sequence.tokens = tokens
    try:
        while (at := store.length) < len(tokens):
            (count,) = share([(len(tokens) - at, multiple, at)], limits)
            part = Slice(
                sequence=sequence,
                stats=stats,
                first=0,
                last=count,
                read=count,
                prompt=True,
                final=at + count == len(tokens),
            )
            model.forward(
                torch.tensor(tokens[at : at + count]),
                torch.arange(at, at + count),
                torch.arange(0),
                StepAttention([part], model.slots, backend),
                torch.arange(0),
            )
            store.advance(count)
    except BaseException:
        store.close()
        raise
    return store
