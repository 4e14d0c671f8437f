"""Huge pages for memory that is full anyway: fewer misses of the address translation, not a byte more.

A page of 4 KiB is 32 entries of one head at head size 64, so that attention over scattered entries looks
up a translation for every one of them. Linux can put one page of 2 MiB, here a *block*, under 512 pages that
a program holds (``MADV_COLLAPSE``, Linux 6.1). Asked for blocks that are held whole, it takes no memory.
Where the system has no such thing everything works as before, only slower.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path

__all__ = ["Blocks", "available", "collapse"]

_COLLAPSE = 25  # not named by Python's mmap module
_MOST = 4 << 20  # bytes; blocks of half a gigabyte, which some systems have, would rarely be full
_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


@cache
def _block_bytes() -> int:
    """Bytes of a block; 0 where there are none."""
    try:
        size = int(_SIZE_FILE.read_text()) if sys.platform == "linux" else 0
    except (OSError, ValueError):
        return 0
    return size if size <= _MOST else 0


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


@cache
def available() -> bool:
    """Whether this system makes blocks on request: it is asked once, for one."""
    size = _block_bytes()
    if not size:
        return False
    memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    at = -address % size
    memory[at] = 1
    return _madvise(address + at, size)


def collapse(address: int, size: int) -> None:
    """Put blocks under the memory at ``address`` that lies in whole blocks, where the system can.

    Parameters
    ----------
    address, size : int
        Bytes. At least one page of every whole block was written before; the others are taken with it.

    Notes
    -----
    Nothing changes where memory is short or too scattered, where it is shared or backed by a file, and where
    the system has no blocks.
    """
    if not available():
        return
    block = _block_bytes()
    first, last = -(-address // block) * block, (address + size) // block * block
    if first < last:
        _madvise(first, last - first)


def _madvise(address: int, size: int) -> bool:
    return bool(_libc().madvise(address, size, _COLLAPSE) == 0)


class Blocks:
    """Which blocks of a mapping are whole, so that giving back a part of one gives memory back.

    A block of which a part is given back would stay in memory as a whole until the system runs short.

    Parameters
    ----------
    mapping : mmap.mmap
        Anonymous and private.
    address : int
        Where it lies.
    """

    def __init__(self, mapping: mmap.mmap, address: int) -> None:
        self._map, self._address = mapping, address
        self._whole: set[int] = set()

    def fill(self, first: int, last: int, held: tuple[int, int]) -> None:
        """Make blocks of bytes ``first .. last - 1``, all of which are about to be held.

        ``held`` are the bytes among them that were written; what follows reads zeros.
        """
        if not available():
            return
        block = _block_bytes()
        begin = -(-(self._address + first) // block)
        new = [b for b in range(begin, (self._address + last) // block) if b not in self._whole]
        for number in new:
            at = number * block - self._address
            # A block needs a page to start from; its first write would have made one.
            if at >= held[1] or at + block <= held[0]:
                self._map[at] = 0
        for number, count in _stretches(new):
            collapse(number * block, count * block)
            self._whole.update(range(number, number + count))  # also where it failed: asked once

    def cut(self, first: int, last: int) -> None:
        """Take apart blocks of which bytes ``first .. last - 1``, about to be given back, are a part."""
        if not self._whole:
            return
        block = _block_bytes()
        first, last = self._address + first, self._address + last
        for number in {first // block, (last - 1) // block}:
            low, high = max(first, number * block), min(last, (number + 1) * block)
            if number in self._whole and high - low < block:
                # It marks what may be dropped, which in a part of a block needs pages of its own.
                self._map.madvise(mmap.MADV_FREE, low - self._address, high - low)
        self._whole.difference_update(range(first // block, -(-last // block)))

    def clear(self) -> None:
        """Everything was given back."""
        self._whole.clear()


def _stretches(numbers: list[int]) -> list[tuple[int, int]]:
    """First number and count of every run of consecutive ones."""
    out: list[tuple[int, int]] = []
    for number in numbers:
        if out and sum(out[-1]) == number:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((number, 1))
    return out
