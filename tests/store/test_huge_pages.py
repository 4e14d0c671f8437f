"""Blocks under full memory: nothing more is held, parts of a block go back, a system without them works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from winnow.store import huge_pages
from winnow.store.arena import PAGE, HostArena
from winnow.store.huge_pages import available

D = 64
ROWS = PAGE // (2 * D)  # of a page of the system
BLOCK = 2 << 20
IN_BLOCK = BLOCK // (2 * D)


@pytest.fixture(scope="module")
def blocks() -> None:
    """Skips where this system has none."""
    if not available() or huge_pages._block_bytes() != BLOCK:
        pytest.skip("this system gives no pages of 2 MiB on request")


def new_arena(heads: int = 3) -> HostArena:
    return HostArena(heads, 6 * IN_BLOCK, D, torch.bfloat16)


def write(arena: HostArena, head: int, first: int, last: int, step: int = 1 << 20) -> None:
    for at in range(first, last, step):
        end = min(at + step, last)
        arena.prepare(head, at, end)
        arena.data[head, at:end] = torch.arange(at, end).unsqueeze(1) % 251


def holds(arena: HostArena, head: int, first: int, last: int) -> bool:
    return bool((arena.data[head, first:last] == torch.arange(first, last).unsqueeze(1) % 251).all())


def in_blocks(arena: HostArena) -> int:
    """Bytes of the arena that the kernel says lie in blocks."""
    address, inside = arena.data.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
        elif inside and first == "AnonHugePages:":
            return int(rest.split()[0]) * 1024
    raise AssertionError


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("step", [4096, 1 << 20])
def test_what_a_prompt_fills_lies_in_blocks_and_the_ledger_stays_right(step: int) -> None:
    arena = new_arena()
    lengths = [4 * IN_BLOCK + 100, IN_BLOCK // 2, 2 * IN_BLOCK]
    for head, n in enumerate(lengths):
        write(arena, head, 0, n, step)
        assert arena.nbytes() == arena.resident()
    assert in_blocks(arena) >= (3 + 0 + 1) * BLOCK  # at least what is whole wherever heads begin
    assert all(holds(arena, head, 0, n) for head, n in enumerate(lengths))


@pytest.mark.usefixtures("blocks")
def test_single_tokens_do_not_wait_for_blocks() -> None:
    arena = new_arena(1)
    for n in range(ROWS, 3 * IN_BLOCK, ROWS):
        arena.prepare(0, n - ROWS, n)
        arena.data[0, n - 1] = 1
    assert in_blocks(arena) == 0
    write(arena, 0, 3 * IN_BLOCK - ROWS, 3 * IN_BLOCK + 4096)  # the next prompt makes up for it
    assert in_blocks(arena) >= 2 * BLOCK
    assert arena.nbytes() == arena.resident()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0, IN_BLOCK + ROWS),
        (IN_BLOCK // 2, 3 * IN_BLOCK),
        (2 * IN_BLOCK + ROWS, 2 * IN_BLOCK + 9 * ROWS),
        (0, 0),
    ],
)
def test_a_part_of_a_block_is_given_back(first: int, last: int) -> None:
    arena = new_arena(1)
    write(arena, 0, 0, 5 * IN_BLOCK)
    arena.retain(0, first, last)
    assert arena.nbytes() == arena.resident()
    assert holds(arena, 0, first, last)
    # No block is left of which only a part is held: the others' bytes are exactly what lies in whole ones.
    base = arena.data.data_ptr()
    whole = (base + 2 * D * last) // BLOCK - -(-(base + 2 * D * first) // BLOCK)
    assert in_blocks(arena) == max(0, whole) * BLOCK
    assert compound(base + 2 * D * first, base + 2 * D * last) == max(0, whole) * BLOCK
    write(arena, 0, last, last + 3 * IN_BLOCK, 4096)
    assert holds(arena, 0, first, last + 3 * IN_BLOCK)
    assert arena.nbytes() == arena.resident()


def compound(low: int, high: int) -> int:
    """Bytes of memory between two addresses that belong to a block, mapped as one or not."""
    count = 0
    try:
        with open("/proc/self/pagemap", "rb") as pagemap, open("/proc/kpageflags", "rb") as flags:
            for page in range(low // PAGE, high // PAGE):
                pagemap.seek(page * 8)
                frame = int.from_bytes(pagemap.read(8), "little") & ((1 << 55) - 1)
                flags.seek(frame * 8)
                count += int.from_bytes(flags.read(8), "little") >> 22 & 1
    except PermissionError:
        pytest.skip("looking at page frames needs privileges")
    return count * PAGE


class Refusing:
    """Stands for the C library of a system that refuses; keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def madvise(self, address: int, size: int, advice: int) -> int:
        self.asked.append(size)
        return -1


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Refusing]:
    refuses = Refusing()
    monkeypatch.setattr(huge_pages, "_libc", lambda: refuses)
    monkeypatch.setattr(huge_pages, "_block_bytes", lambda: BLOCK)
    available.cache_clear()
    yield refuses
    available.cache_clear()


def test_a_system_without_blocks_is_asked_once(refusing: Refusing) -> None:
    arena = new_arena()
    for head in range(3):
        write(arena, head, 0, 2 * IN_BLOCK + 100, 4096)
        assert holds(arena, head, 0, 2 * IN_BLOCK + 100)
    assert arena.nbytes() == arena.resident()
    assert refusing.asked == [BLOCK]


def test_where_no_block_can_be_had_the_memory_stays_as_it_is(
    refusing: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "available", lambda: True)
    arena = new_arena(1)
    write(arena, 0, 0, 2 * IN_BLOCK + 100)
    assert len(refusing.asked) == 1
    arena.retain(0, 0, IN_BLOCK // 2)
    assert holds(arena, 0, 0, IN_BLOCK // 2)
    assert arena.nbytes() == arena.resident()
