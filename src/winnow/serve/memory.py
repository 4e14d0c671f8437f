"""KV memory as a hard limit: sequences and pools of all engines together never exceed it.

Sequences come first. What they leave belongs to the pools, of prefixes and of chunks, whose capacity follows:
it is what the limit leaves after every running sequence has grown by the next step. Where even empty pools
leave too little, somebody must go to the swap; who, the worker decides. What lies in the swap and in files
has limits of its own and does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from winnow.engine.engine import Engine
from winnow.retrieval.protocol import Bounded, Pool
from winnow.store.swap import Swap

__all__ = ["Memory"]


@dataclass(frozen=True)
class _Shrinkable:
    pool: Bounded
    most: int  # bytes that it may hold, however much room there is


class Memory:
    """The ledger over several engines; belongs to the worker's thread.

    Parameters
    ----------
    limit : int
        Bytes.
    engines : sequence of Engine
        Engines whose sequences count; they may share pools.
    swap : Swap
        Where suspended sequences are.

    Attributes
    ----------
    peak : int
        Most bytes that were held at a time.
    pools : list of Pool
        The engines' pools of prefixes, each once.
    """

    def __init__(self, limit: int, engines: Sequence[Engine], swap: Swap) -> None:
        self.limit = limit
        self.peak = 0
        self.pools: list[Pool] = []
        self._engines = list(engines)
        self._swap = swap
        for engine in engines:
            if engine.pool is not None and all(engine.pool is not pool for pool in self.pools):
                self.pools.append(engine.pool)
        repairs = [engine.repair for engine in engines if engine.repair is not None]
        self._chunks = [_Shrinkable(repair.pool, repair.part.capacity_bytes) for repair in repairs]
        self._all = [*(_Shrinkable(pool, limit) for pool in self.pools), *self._chunks]
        # Regions grow by whole pages; a little air keeps admission from being undone at once.
        self._air = limit // 50

    # ------------------------------------------------------------------ what is held

    def held(self) -> int:
        """Bytes held now, measured; the highest is remembered."""
        held = sum(self.by_kind().values())
        self.peak = max(self.peak, held)
        return held

    def by_kind(self) -> dict[str, int]:
        """The same by ``tier/codec``; what the pools hold is ``host/pool`` and ``host/chunks``."""
        kinds = {"host/pool": sum(pool.bytes() for pool in self.pools)}
        if self._chunks:
            kinds["host/chunks"] = sum(one.pool.bytes() for one in self._chunks)
        for engine in self._engines:
            for kind, count in engine.bytes_stored().items():
                kinds[kind] = kinds.get(kind, 0) + count
        return kinds

    def elsewhere(self) -> dict[str, int]:
        """Bytes that are not under the limit: of suspended sequences, and the pools' files."""
        swapped = self._swap.bytes()
        kinds = {
            "swap/packed": swapped.get("swap", 0),
            "disk/swap": swapped.get("disk", 0),
            "disk/pool": sum(pool.bytes_on_disk() for pool in self.pools),
        }
        return {kind: count for kind, count in kinds.items() if count}

    def clear(self) -> None:
        """Drop every reusable entry that nobody is using, files included."""
        for one in self._all:
            one.pool.clear()

    # ------------------------------------------------------------------ what fits

    def admits(self, need: int, chunks: int = 0) -> bool:
        """Whether ``need`` more bytes fit beside what the requests have been promised.

        Pools shrink for it where that helps; pools of chunks must have room for ``chunks`` more bytes.
        """
        promised = sum(engine.bytes_promised() for engine in self._engines)
        air = self._air if promised else 0
        coming = chunks + self._coming()
        return promised + need + coming + air <= self.limit and self._shrink(promised + need, coming)

    def step_fits(self) -> bool:
        """Whether every engine can take its next step; pools shrink for it where that helps."""
        held = sum(engine.bytes_held() for engine in self._engines)
        after = held + sum(engine.growth() for engine in self._engines)
        return self._shrink(after, self._coming())

    def _coming(self) -> int:
        """Most bytes of chunks that the next step computes."""
        return sum(engine.chunks_coming() for engine in self._engines)

    def _shrink(self, others: int, coming: int) -> bool:
        """Give the pools what ``others`` bytes leave; False where entries in use take more.

        Pools of chunks may grow by ``coming`` bytes on top of what is shared out.
        """
        room = self.limit - others - coming
        for one in self._all:
            rest = sum(other.pool.bytes() for other in self._all if other is not one)
            one.pool.resize(max(min(one.most, room - rest), 0))
        spare = room - sum(one.pool.bytes() for one in self._all)
        if spare < 0:
            return False
        for one in self._all:
            extra = spare // len(self._all) + (coming if one in self._chunks else 0)
            one.pool.resize(min(one.most, one.pool.bytes() + extra))
        return True
