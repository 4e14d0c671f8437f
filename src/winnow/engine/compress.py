"""Carry out a recipe's compression on a sequence: at the end of a prefill, in it, and while decoding."""

from __future__ import annotations

import copy
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, get_type_hints

import torch

from winnow.compression import tracks
from winnow.compression.memory import plain, restored, tensors
from winnow.compression.protocol import Compress, Setting
from winnow.engine.request import Stats
from winnow.engine.watch import QueryWatch
from winnow.store.sequence import SequenceStore
from winnow.types import Glimpse, LanguageModel, Observation, Plan, Profile, Scores

__all__ = ["Compression", "growth", "uninterrupted"]


class Compression:
    """What a compression remembers of one sequence, and how it acts on it.

    Parameters
    ----------
    recipe : Compress
    profile : Profile or None

    Attributes
    ----------
    queries : QueryWatch
    acted : int
        Tokens of the sequence when it last acted, or when its prompt ended.
    """

    def __init__(self, recipe: Compress, profile: Profile | None) -> None:
        self.recipe = recipe
        self.queries = QueryWatch(recipe.needs, decoding=recipe.every > 0)
        self.acted = 0
        self._profile = profile
        self.forget()

    def copy(self) -> Compression:
        """The same memory for another sequence that holds the same entries."""
        other = Compression(self.recipe, self._profile)
        other.acted = self.acted
        other._score_state = copy.deepcopy(self._score_state)
        other._budget_state = copy.deepcopy(self._budget_state)
        other._act_state = copy.deepcopy(self._act_state)
        return other

    # ------------------------------------------------------------------ memory

    @property
    def _states(self) -> tuple[Any, Any, Any]:
        return self._score_state, self._budget_state, self._act_state

    def memory(self) -> dict[str, Any]:
        """What it remembers, as JSON values and tensors, for :meth:`recall`."""
        return {"acted": self.acted, "states": [plain(state) for state in self._states]}

    def forget(self) -> None:
        """Free what :meth:`memory` gave; :meth:`recall` brings it back."""
        recipe = self.recipe
        self._score_state, self._budget_state, self._act_state = (
            part.state() for part in (recipe.score, recipe.budget, recipe.act)
        )

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Remember what another one did, under the same recipe."""
        self.acted = int(memory["acted"])
        parts: tuple[Any, ...] = (self.recipe.score, self.recipe.budget, self.recipe.act)
        self._score_state, self._budget_state, self._act_state = (
            restored(get_type_hints(type(part).state)["return"], state)
            for part, state in zip(parts, memory["states"], strict=True)
        )

    @property
    def remembers(self) -> bool:
        """Whether a sequence of this recipe goes on otherwise if :meth:`memory` is lost."""
        return self.recipe.every > 0 or any(state is not None for state in self._states)

    def bytes(self) -> dict[str, int]:
        """Bytes of what it remembers, by tier."""
        held: Counter[str] = Counter()
        for tensor in (t for state in self._states for t in tensors(state)):
            held["host" if tensor.device.type == "cpu" else "device"] += tensor.untyped_storage().nbytes()
        return dict(held)

    def reserve(self, store: SequenceStore) -> None:
        """Make room for the numbers that the scorer keeps of every entry."""
        for layer in range(store.layers):
            tracks.reserve(self._score_state, layer, store.lengths(layer))

    # ------------------------------------------------------------------ when

    def acts_on_turn(self, turns: int) -> bool:
        """Whether it acts at the end of a prefill, before which ``turns`` prefills ended."""
        return self.recipe.turns == "every" or (self.recipe.turns == "first" and turns == 0)

    def at_border(self, tokens: int) -> bool:
        """Whether a block of a prefill ends where the sequence is ``tokens`` long."""
        return self.recipe.block > 0 and tokens % self.recipe.block == 0

    def due(self, tokens: int) -> bool:
        """Whether it acts now, after a decode step that made the sequence ``tokens`` long."""
        return 0 < self.recipe.every <= tokens - self.acted

    def wants_mass(self, *, prompt: bool) -> bool:
        """Whether a call's attention mass is to be handed to :meth:`watch`."""
        wanted = self.recipe.needs.mass
        return wanted == "all" or (wanted == "decode" and not prompt)

    def looks_from(self, end: int) -> int:
        """First position of a prompt that ends before ``end`` of which it wants the query or the mass."""
        since = self.queries.since(end)
        if self.wants_mass(prompt=True) or (self.recipe.block and since < end):
            return 0  # a prompt of blocks ends at each border
        return since

    def watch(self, seen: Glimpse) -> None:
        """Hand a call's attention mass to the scorer."""
        self.recipe.score.watch(seen, self._score_state)

    # ------------------------------------------------------------------ what

    def act(self, store: SequenceStore, model: LanguageModel, stats: Stats) -> None:
        """Score, allocate, plan and apply, layer by layer where the budget allows it.

        Nothing changes in the store until every decision is made, and a Ctrl-C that arrives while
        plans are carried out is delivered afterwards: layers never disagree.

        Parameters
        ----------
        store : SequenceStore
        model : LanguageModel
        stats : Stats
            Gets the entries before and after.
        """
        before = _entries(store)
        layers = list(range(store.layers))
        queries = {layer: self.queries.take(layer) for layer in layers}

        def seen(layer: int) -> Observation:
            asked = queries[layer]
            needs = self.recipe.needs
            return Observation(
                layer=layer,
                layers=store.layers,
                spec=model.specs[model.slots.index(layer)],
                segment=store.decoded(layer),
                tokens=store.length,
                queries=None if asked is None else asked[0],
                query_positions=None if asked is None else asked[1],
                rotary=model.rotary(model.slots.index(layer)) if needs.rotary else None,
                profile=self._profile,
            )

        budget, act = self.recipe.budget, self.recipe.act
        plans: dict[int, Plan] = {}
        groups = [[layer] for layer in layers] if budget.scope == "layer" else [layers]
        for group in groups:
            scores: list[Scores] = [self.recipe.score.score(seen(i), self._score_state) for i in group]
            setting = Setting(layers=group, of=store.layers, tokens=store.length, profile=self._profile)
            rooms = budget.allocate(scores, setting, self._budget_state)
            for layer, of_layer, room in zip(group, scores, rooms, strict=True):
                plans[layer] = act.plan(seen(layer), of_layer, room, self._act_state)
        with uninterrupted():
            for layer, plan in plans.items():
                store.apply(layer, plan)
                if plan.keep is not None:
                    self.recipe.score.follow(layer, plan.keep, self._score_state)
        self.acted = store.length
        stats.entries_before += before
        stats.entries_after += _entries(store)

    def truncated(self, store: SequenceStore) -> None:
        """The store was rolled back: forget the entries that went, and what was half observed."""
        self.queries.forget()
        self.acted = min(self.acted, store.length)
        for layer in range(store.layers):
            kept: Sequence[torch.Tensor] = [torch.arange(n) for n in store.lengths(layer)]
            self.recipe.score.follow(layer, kept, self._score_state)
            self.recipe.act.truncated(layer, store.segments(layer), store.length, self._act_state)


def growth(recipe: Compress | None, tokens: int) -> int:
    """Most bytes per layer and KV head that a scorer's numbers take for ``tokens`` entries more."""
    return 0 if recipe is None else tracks.growth(recipe.score.state(), tokens)


def _entries(store: SequenceStore) -> int:
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
