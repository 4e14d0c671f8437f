"""Reserved memory for one plane of entries: growth never copies, pages are given back at once.

An arena is a table ``[H, C, W]``: for every KV head a region of ``C`` rows of ``W`` elements. On a
CPU the region is *reserved* (virtual memory) for the longest sequence the model allows and
*touched* (resident memory) only where entries lie. See ``docs/decisions/0002-ragged-arena.md``.
"""

from __future__ import annotations

import abc
import ctypes
import math
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from winnow.store.huge_pages import Blocks
from winnow.types import Tier

__all__ = ["PAGE", "Arena", "DeviceArena", "DiskArena", "HostArena", "open_arena"]

PAGE = mmap.PAGESIZE
"""Bytes of a page of the operating system, the unit in which memory is held."""

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_BULK = 64  # pages: what a prompt adds to a head in one step, and a decoded token never does
_MADV_REMOVE = 9  # punch a hole into a file mapping; not named by Python's mmap module


class Arena(abc.ABC):
    """Rows of one plane for all KV heads of one layer.

    Rows of head ``h`` that hold something form one span ``[first, last)``. :meth:`prepare` must be
    called before rows are written, :meth:`retain` after the span has shrunk.

    Attributes
    ----------
    data : Tensor
        ``[H, C, W]``. A device arena may replace it in :meth:`prepare`; the others never do.
    rows, bases : Tensor
        The same memory as ``[rows, W]``, and ``[H]`` the row at which each head begins: for writing
        one row per head at different places with one call.
    """

    data: Tensor
    rows: Tensor
    bases: Tensor

    @abc.abstractmethod
    def prepare(self, head: int, first: int, last: int) -> int:
        """Make rows ``first .. last - 1`` writable; return up to which row they now are."""

    @abc.abstractmethod
    def retain(self, head: int, first: int, last: int) -> None:
        """Give back what lies outside rows ``first .. last - 1``."""

    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes held now."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back now, whoever still holds a view; idempotent."""


class _Mapped(Arena):
    """What anonymous and file-backed mappings have in common: a ledger of touched pages.

    The rows of a head start on a page of the operating system, so no page is shared by two heads
    and the touched pages of a head are one interval. A test holds the ledger against ``mincore``.
    """

    def __init__(
        self, mapping: mmap.mmap, heads: int, rows: int, stride: int, width: int, dtype: torch.dtype
    ):
        self._map = mapping
        self._row = width * dtype.itemsize
        self._region = stride * self._row
        self._low = [0] * heads
        self._high = [0] * heads
        # frombuffer keeps the mapping alive but does not lock it: never call mapping.close(), which
        # would unmap under live views; close() below empties it instead and views read zeros.
        flat = torch.frombuffer(mapping, dtype=dtype, count=heads * stride * width)
        self.rows = flat.view(heads * stride, width)
        self.bases = torch.arange(heads) * stride
        self.data = flat.view(heads, stride, width)[:, :rows]

    def prepare(self, head: int, first: int, last: int) -> int:
        low, high = first * self._row // PAGE, -(-last * self._row // PAGE)
        old_low, old_high = self._low[head], self._high[head]
        if old_low < old_high:
            assert max(low, old_low) <= min(high, old_high), "the rows of a head are one span"
            low, high = min(low, old_low), max(high, old_high)
        self._fault(head, old_low, old_high, low, high)
        self._low[head], self._high[head] = low, high
        return high * PAGE // self._row

    def retain(self, head: int, first: int, last: int) -> None:
        old_low, old_high = self._low[head], self._high[head]
        low, high = (first * self._row // PAGE, -(-last * self._row // PAGE)) if last > first else (0, 0)
        if low >= high:
            self.discard(head, old_low, old_high)
            self._low[head] = self._high[head] = 0
            return
        assert old_low <= low < high <= old_high, "only prepared rows can be retained"
        self.discard(head, old_low, low)
        self.discard(head, high, old_high)
        self._low[head], self._high[head] = low, high

    def discard(self, head: int, low: int, high: int) -> None:
        """Give pages ``low .. high - 1`` of a head's region back; the ledger is the caller's."""
        if high > low:
            self._map.madvise(self._advice, head * self._region + low * PAGE, (high - low) * PAGE)

    def nbytes(self) -> int:
        return PAGE * sum(high - low for low, high in zip(self._low, self._high, strict=True))

    def resident(self) -> int:
        """Bytes that the kernel says are in memory (``mincore``); slow, for tests and diagnosis."""
        length = len(self._map)
        pages = (ctypes.c_ubyte * (length // PAGE))()
        libc = ctypes.CDLL(None, use_errno=True)
        address = self.data.untyped_storage().data_ptr()
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), pages):
            raise OSError(ctypes.get_errno(), "mincore failed")
        return PAGE * sum(page & 1 for page in bytes(pages))

    def close(self) -> None:
        if any(self._high):
            self._map.madvise(self._advice)
        self._low = [0] * len(self._low)
        self._high = [0] * len(self._high)

    _advice: int = mmap.MADV_DONTNEED

    def _fault(self, head: int, old_low: int, old_high: int, low: int, high: int) -> None:
        """Called before the touched pages of a head become ``low .. high - 1``."""


class HostArena(_Mapped):
    """Anonymous private memory, reserved whole and touched on demand."""

    def __init__(self, heads: int, rows: int, width: int, dtype: torch.dtype):
        stride = _stride(rows, width * dtype.itemsize)
        size = heads * stride * width * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        try:
            mapping = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            raise ValueError(
                f"could not reserve {size / 2**30:.1f} GiB of address space for {rows} entries; "
                "lower the capacity or raise `ulimit -v` and vm.max_map_count"
            ) from error
        super().__init__(mapping, heads, rows, stride, width, dtype)
        self._blocks = Blocks(mapping, self.data.untyped_storage().data_ptr())

    def discard(self, head: int, low: int, high: int) -> None:
        if high > low:
            begin = head * self._region
            self._blocks.cut(begin + low * PAGE, begin + high * PAGE)
        super().discard(head, low, high)

    def close(self) -> None:
        super().close()
        self._blocks.clear()

    def _fault(self, head: int, old_low: int, old_high: int, low: int, high: int) -> None:
        # A block takes milliseconds, and those of all heads and layers fill up in the same step: while
        # decoding nobody waits for them, the next prompt will.
        if (high - low) - (old_high - old_low) >= _BULK:
            begin = head * self._region
            held = (begin + old_low * PAGE, begin + old_high * PAGE)
            self._blocks.fill(begin + low * PAGE, begin + high * PAGE, held)


class DiskArena(_Mapped):
    """An unlinked temporary file, mapped: readable by every kernel, kept by the page cache or the disk."""

    _advice = _MADV_REMOVE

    def __init__(self, heads: int, rows: int, width: int, dtype: torch.dtype, directory: Path | None):
        stride = _stride(rows, width * dtype.itemsize)
        size = heads * stride * width * dtype.itemsize
        where = Path(directory) if directory is not None else Path(tempfile.gettempdir())
        try:
            with tempfile.TemporaryFile(dir=where, prefix="winnow-") as file:
                self._fd = os.dup(file.fileno())
            try:
                os.ftruncate(self._fd, size)  # sparse: blocks are taken in _fault
                mapping = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise _disk_error(error, where) from error
        self._where = where
        self._open = True
        super().__init__(mapping, heads, rows, stride, width, dtype)

    def _fault(self, head: int, old_low: int, old_high: int, low: int, high: int) -> None:
        # Writing through a mapping to a full disk kills the process with SIGBUS; taking the blocks
        # first turns that into an error before anything was written.
        try:
            for a, b in (
                ((low, min(high, old_low)), (max(low, old_high), high)) if old_high else ((low, high),)
            ):
                if b > a:
                    os.posix_fallocate(self._fd, head * self._region + a * PAGE, (b - a) * PAGE)
        except OSError as error:
            raise _disk_error(error, self._where) from error

    def allocated(self) -> int:
        """Bytes that the file system says the file takes; for tests and diagnosis."""
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        super().close()
        if self._open:
            os.close(self._fd)
            self._open = False

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            os.close(self._fd)
            self._open = False


class DeviceArena(Arena):
    """A plain tensor on an accelerator that doubles: growth copies, by the rule of the decision page."""

    def __init__(self, heads: int, rows: int, width: int, dtype: torch.dtype, device: torch.device):
        self._most = rows
        self._set(torch.empty(heads, 0, width, dtype=dtype, device=device))

    def _set(self, data: Tensor) -> None:
        self.data = data
        self.rows = data.view(-1, data.shape[2])
        self.bases = torch.arange(data.shape[0], device=data.device) * data.shape[1]

    def prepare(self, head: int, first: int, last: int) -> int:
        have = self.data.shape[1]
        if last > have:
            heads, _, width = self.data.shape
            rows = min(self._most, max(last, 2 * have, 64))
            grown = torch.empty(heads, rows, width, dtype=self.data.dtype, device=self.data.device)
            grown[:, :have] = self.data
            self._set(grown)
        return self.data.shape[1]

    def retain(self, head: int, first: int, last: int) -> None:
        """Keep the tensor: it is one allocation, and the next growth would need it again."""

    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def close(self) -> None:
        heads, _, width = self.data.shape
        self._set(self.data.new_empty(heads, 0, width))


def open_arena(
    heads: int,
    rows: int,
    width: int,
    dtype: torch.dtype,
    *,
    tier: Tier = "host",
    device: torch.device | None = None,
    directory: Path | None = None,
) -> Arena:
    """Return an arena of ``heads`` regions of ``rows`` rows of ``width`` elements on a tier.

    Raises
    ------
    ValueError
        If the memory cannot be reserved or the directory of the disk tier cannot be written.
    """
    if tier == "device":
        assert device is not None
        return DeviceArena(heads, rows, width, dtype, device)
    if tier == "disk":
        return DiskArena(heads, rows, width, dtype, directory)
    return HostArena(heads, rows, width, dtype)


def _stride(rows: int, row_bytes: int) -> int:
    """Rows between two heads: whole pages, and never a power of two of them.

    Regions a power of two apart would put the same entry of all heads into the same few cache
    sets; one extra page of address space per head costs nothing.
    """
    unit = math.lcm(PAGE, row_bytes) // row_bytes
    return (-(-rows // unit) + 1) * unit


def _disk_error(error: OSError, where: Path) -> ValueError:
    return ValueError(
        f"cannot move entries to disk under {where}: {error.strerror or error}; "
        "free space there or choose another directory"
    )
