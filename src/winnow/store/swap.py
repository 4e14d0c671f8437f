"""Where entries wait whose sequence had to leave memory: a budget of host memory first, then a directory.

Both hold what :mod:`winnow.store.files` writes, packed without loss, so a sequence comes back bit by bit. It
lives no longer than the process: nothing is forced to the disk.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections import Counter
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch

from winnow.store import files
from winnow.store.arena import PAGE
from winnow.store.files import RotaryOf, StoreFileError
from winnow.store.sequence import SequenceStore

__all__ = ["Parked", "Swap"]

_names = itertools.count()
_INDEX = 16 << 20  # address space for what a file holds besides entries; memory is taken as it is written


class _Memory(BufferedIOBase):
    """A file in anonymous memory: at most ``limit`` bytes, of which pages are taken as it grows."""

    def __init__(self, limit: int) -> None:
        self._map = mmap.mmap(-1, limit)
        self._at = 0
        self._end = 0

    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override]
        last = self._at + len(data)
        if last > len(self._map):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._map[self._at : last] = data
        self._at, self._end = last, max(self._end, last)
        return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        last = self._end if size is None or size < 0 else min(self._at + size, self._end)
        data = self._map[self._at : last]
        self._at = max(self._at, last)
        return data

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = position + (self._end if whence == os.SEEK_END else 0)
        return self._at

    def nbytes(self) -> int:
        """Bytes of memory pages that were written to."""
        return -(-self._end // PAGE) * PAGE

    def close(self) -> None:
        self._map.close()
        super().close()


class Parked:
    """Entries of one sequence in a swap.

    Attributes
    ----------
    tier : {"swap", "disk"}
        Host memory, or a file.
    bytes : int
        Bytes that they take where they wait.
    bytes_back : int
        Bytes that they take once they are back.
    """

    def __init__(self, swap: Swap, place: _Memory | Path, size: int, bytes_back: int) -> None:
        self.tier = "disk" if isinstance(place, Path) else "swap"
        self.bytes = size
        self.bytes_back = bytes_back
        self._swap = swap
        self._place = place

    def take(
        self, *, device: str | torch.device = "cpu", rotary: RotaryOf | None = None
    ) -> tuple[SequenceStore, dict[str, Any]]:
        """Bring the entries back and free their place; see :func:`winnow.store.files.load`.

        Raises
        ------
        StoreFileError
            A file is gone or damaged; :meth:`drop` what is left of it.
        """
        if isinstance(self._place, Path):
            taken = files.load(self._place, device=device, rotary=rotary)
        else:
            self._place.seek(0)
            taken = files.read(self._place, Path("swap"), device=device, rotary=rotary)
        self.drop()
        return taken

    def drop(self) -> None:
        """Free their place; may be called again."""
        if self in self._swap.parked:
            self._swap.parked.remove(self)
            if isinstance(self._place, Path):
                self._place.unlink(missing_ok=True)
            else:
                self._place.close()


class Swap:
    """Host memory up to ``space`` bytes, then files. One thread at a time.

    Parameters
    ----------
    directory : Path
        For what host memory has no room for.
    space : int
        Most bytes of host memory.

    Attributes
    ----------
    parked : list of Parked
        What waits.
    peak : int
        Most bytes of host memory that were held at a time.
    """

    def __init__(self, directory: Path, space: int = 0) -> None:
        self.space = space
        self.peak = 0
        self.parked: list[Parked] = []
        self._directory = directory

    def bytes(self) -> dict[str, int]:
        """Bytes held, by tier."""
        held: Counter[str] = Counter()
        for one in self.parked:
            held[one.tier] += one.bytes
        return dict(held)

    def put(self, store: SequenceStore, header: Mapping[str, Any], *, beside: int = 0) -> Parked:
        """Write every entry of a sequence, those of a pool that it reads included.

        Parameters
        ----------
        store : SequenceStore
        header : mapping
            JSON values and tensors that come back with them.
        beside : int
            Bytes of these.

        Raises
        ------
        StoreFileError
            Host memory has no room, and the directory no space or permission; nothing has changed.
        """
        back = sum(store.bytes().values()) + store.shared_bytes() + beside
        parked = self._in_memory(store, header, back) or self._on_disk(store, header, back)
        self.parked.append(parked)
        self.peak = max(self.peak, self.bytes().get("swap", 0))
        return parked

    def _in_memory(self, store: SequenceStore, header: Mapping[str, Any], back: int) -> Parked | None:
        left = (self.space - self.bytes().get("swap", 0)) // PAGE * PAGE
        # Packing seldom makes a third of entries: what will hardly fit is not tried.
        if left <= 0 or back > 3 * left:
            return None
        memory = _Memory(min(left, -(-back // PAGE) * PAGE + _INDEX))
        try:
            files.write(store, memory, header, packed=True)
        except OSError:  # it does not fit
            memory.close()
            return None
        return Parked(self, memory, memory.nbytes(), back)

    def _on_disk(self, store: SequenceStore, header: Mapping[str, Any], back: int) -> Parked:
        path = self._directory / f"{next(_names)}.kv"
        try:
            with path.open("xb") as file:
                size = files.write(store, file, header, packed=True)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StoreFileError(
                f"cannot move entries to {path}: {error.strerror or error}; free space there or choose "
                "another place"
            ) from error
        return Parked(self, path, size, back)
