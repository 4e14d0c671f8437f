"""What one running sequence owns: its tokens, its entries, and the state of the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from winnow.engine.compress import Compression
from winnow.recipe import Recipe
from winnow.retrieval.protocol import Match, Pool
from winnow.store.sequence import SequenceStore
from winnow.store.swap import Parked, Swap
from winnow.types import LanguageModel, Profile, Rotary

__all__ = ["Holder", "Sequence", "rotary_of"]


def rotary_of(model: LanguageModel) -> Callable[[int], Rotary | None]:
    """How the layers of a store turn keys."""
    return lambda layer: model.rotary(model.slots.index(layer))


class Holder:
    """Entries that several sequences read; freed when the last of them lets go."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free
        self._users = 0

    def take(self) -> Holder:
        """Count one more user."""
        self._users += 1
        return self

    def drop(self) -> None:
        """Count one user less; the last one frees."""
        self._users -= 1
        if self._users == 0:
            self._free()


class Sequence:
    """Tokens, entries and part state of one sequence.

    Attributes
    ----------
    tokens : list of int
        The whole sequence; ``tokens[store.length:]`` are not computed yet.
    store : SequenceStore
    pure : int
        Leading tokens whose entries depend on nothing but the tokens before them and the
        generation recipe: what may go to a pool. Decoding with a sparse view, or compression,
        ends it.
    turns : int
        Prefills that have ended.
    compressed : int
        Length when entries were last dropped or changed; 0 where they never were.
    salt : str
        Sequences of different salts share nothing through a pool.
    probe : list of int
        Text that is read over the entries before a compression that asks for one acts.
    compression : Compression or None
        What the recipe's compression remembers of this sequence.
    """

    def __init__(self, recipe: Recipe, store: SequenceStore, profile: Profile | None = None) -> None:
        self.recipe = recipe
        self.store = store
        self.tokens: list[int] = []
        self.pure = 0
        self.turns = 0
        self.compressed = 0
        self.salt = ""
        self.probe: list[int] = []
        self.generation_state: Any = recipe.generation.state() if recipe.generation else None
        self.loading_state: Any = recipe.loading.state() if recipe.loading else None
        self.compression = Compression(recipe.compression, profile) if recipe.compression else None
        self._borrowed: list[Callable[[], None]] = []

    # ------------------------------------------------------------------ borrowed entries

    def borrow(self, match: Match, pool: Pool) -> None:
        """Start from entries of a pool; they stay locked until :meth:`close`."""
        self.store.adopt(match.layers, match.length)
        self.pure = match.length
        self._borrowed.append(lambda: pool.release(match))

    def share(self, holder: Holder, parent: Sequence) -> None:
        """Start from a snapshot of another sequence's entries, which ``holder`` keeps alive."""
        layers = [parent.store.segments(layer) for layer in range(parent.store.layers)]
        self.store.adopt(layers, parent.store.length)
        self.tokens = list(parent.tokens)
        self.pure, self.turns, self.compressed = parent.pure, parent.turns, parent.compressed
        if parent.compression is not None:
            self.compression = parent.compression.copy()
        self._borrowed.append(holder.take().drop)

    # ------------------------------------------------------------------ accounting and end

    def bytes_stored(self) -> dict[str, int]:
        """Measured KV bytes by ``tier/codec``, borrowed entries and side data apart."""
        held = {f"{tier}/{codec}": n for (tier, codec), n in self.store.bytes().items() if n}
        if shared := self.store.shared_bytes():
            held["host/shared"] = shared
        loading = self.recipe.loading
        if loading is not None and (side := loading.state_bytes(self.loading_state)):
            held["host/index"] = side
        if self.compression is not None:
            held |= {f"{tier}/state": n for tier, n in self.compression.bytes().items()}
        return held

    def bytes_owned(self) -> int:
        """Measured KV bytes that go when this sequence closes: what is borrowed is not among them."""
        return sum(n for kind, n in self.bytes_stored().items() if kind != "host/shared")

    def suspend(self, swap: Swap) -> Parked:
        """Move every entry to a swap, borrowed ones and what belongs to them included.

        :meth:`resume` brings them back.
        Side data of a selector is keyed by the segments that go: it is built anew.

        Raises
        ------
        winnow.store.files.StoreFileError
            No space or no permission; nothing has changed.
        """
        if self.compression is None:
            parked = swap.put(self.store, {})
        else:
            header = {"compression": self.compression.memory()}
            parked = swap.put(self.store, header, beside=sum(self.compression.bytes().values()))
            self.compression.forget()
        self.close()
        if self.recipe.loading is not None:
            self.loading_state = self.recipe.loading.state()
        return parked

    def resume(self, parked: Parked, model: LanguageModel) -> None:
        """Take back what :meth:`suspend` moved."""
        self.store, header = parked.take(device=model.device, rotary=rotary_of(model))
        if self.compression is not None:
            self.compression.recall(header["compression"])

    @torch.inference_mode()  # what the store and the parts hold was made so, and refuses to change outside
    def rollback(self, tokens: int, computed: int, turns: int) -> None:
        """Forget what came after ``tokens`` tokens, of which ``computed`` have entries.

        Side data of a selector is keyed by segment version, which the store changes here.
        """
        del self.tokens[tokens:]
        self.store.truncate(computed)
        self.pure = min(self.pure, computed)
        self.turns = turns
        if self.compression is not None:
            self.compression.truncated(self.store)

    def close(self) -> None:
        """Free the entries and give back what was borrowed; may be called again."""
        self.store.close()
        while self._borrowed:
            self._borrowed.pop()()
