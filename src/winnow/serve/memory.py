"""KV memory as a hard limit: sequences and pools of all engines together never exceed it.

Sequences come first. What they leave belongs to the pools, whose capacity follows: it is what the
limit leaves after every running sequence has grown by the next step. Where even empty pools leave too
little, somebody must go to disk; who, the worker decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from winnow.engine.engine import Engine
from winnow.retrieval.protocol import Pool

__all__ = ["Memory"]


class Memory:
    """The ledger over several engines; belongs to the worker's thread.

    Parameters
    ----------
    limit : int
        Bytes.
    engines : sequence of Engine
        Engines whose sequences count; they may share pools.

    Attributes
    ----------
    room : int
        The limit less what the pools of chunks may hold, which keep to a capacity of their own.

    Raises
    ------
    ValueError
        Pools of chunks would leave less than half of the limit.
    """

    def __init__(self, limit: int, engines: Sequence[Engine]) -> None:
        self.limit = limit
        self.peak = 0
        self.pools: list[Pool] = []
        self._engines = list(engines)
        self._chunks = [engine.repair for engine in engines if engine.repair is not None]
        taken = sum(repair.part.capacity_bytes for repair in self._chunks)
        self.room = limit - taken
        if 2 * taken > limit:
            raise ValueError(
                f"pools of chunks may take {taken} of {limit} bytes of KV memory; lower their capacity_bytes "
                "in the recipe to half of it, or raise --kv-memory"
            )
        for engine in engines:
            if engine.pool is not None and all(engine.pool is not pool for pool in self.pools):
                self.pools.append(engine.pool)
        # Regions grow by whole pages; a little air keeps admission from being undone at once.
        self._air = limit // 50

    def held(self) -> int:
        """Bytes held now, measured; the highest is remembered."""
        held = sum(self.by_kind().values())
        self.peak = max(self.peak, held)
        return held

    def by_kind(self) -> dict[str, int]:
        """The same by ``tier/codec``; what the pools hold is ``host/pool`` and ``host/chunks``."""
        kinds = {"host/pool": sum(pool.bytes() for pool in self.pools)}
        if self._chunks:
            kinds["host/chunks"] = sum(repair.pool.bytes() for repair in self._chunks)
        for engine in self._engines:
            for kind, count in engine.bytes_stored().items():
                kinds[kind] = kinds.get(kind, 0) + count
        return kinds

    def admits(self, need: int) -> bool:
        """Whether ``need`` more bytes fit beside what the requests have been promised.

        Pools shrink for it where that helps.
        """
        promised = sum(engine.bytes_promised() for engine in self._engines)
        air = self._air if promised else 0
        return promised + need + air <= self.room and self._shrink(promised + need)

    def step_fits(self) -> bool:
        """Whether every engine can take its next step; pools shrink for it where that helps."""
        after = self._sequences() + sum(engine.growth() for engine in self._engines)
        return after <= self.room and self._shrink(after)

    def _sequences(self) -> int:
        return sum(engine.bytes_held() for engine in self._engines)

    def _shrink(self, others: int) -> bool:
        """Give the pools what ``others`` bytes leave; False where locked entries take more."""
        for pool in self.pools:
            rest = sum(other.bytes() for other in self.pools if other is not pool)
            pool.resize(max(self.room - others - rest, 0))
        return others + sum(pool.bytes() for pool in self.pools) <= self.room
