"""Reported bytes are the bytes that the process and the disk really hold; failures change nothing."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from winnow.store import SequenceStore
from winnow.store.arena import PAGE, DiskArena, HostArena, open_arena
from winnow.types import Demotion, Plan

LAYERS, HEADS, D = 4, 4, 64
ENTRY = 2 * D * 2  # bytes of K and V in bfloat16


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, counted exactly by the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of temporaries is not the store's
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def new_store(capacity: int = 1 << 17, **extra: object) -> SequenceStore:
    return SequenceStore(
        layers=LAYERS, heads=HEADS, head_dim=D, dtype=torch.bfloat16, capacity=capacity, **extra
    )


def fill(store: SequenceStore, tokens: int, chunk: int = 1000) -> None:
    while tokens:
        n = min(chunk, tokens)
        k = torch.randn(n, HEADS, D).bfloat16()
        positions = torch.arange(store.length, store.length + n)
        for layer in range(LAYERS):
            store.append(layer, k, k, positions)
        store.advance(n)
        tokens -= n


def total(store: SequenceStore) -> int:
    return sum(store.bytes().values())


def test_bytes_follow_the_process_through_the_life_of_a_sequence(tmp_path: Path) -> None:
    tokens = 12_000
    fill(new_store(), 1000)  # code and scratch that stay
    base = anonymous_bytes()

    def close_to(expected: int) -> None:
        held = anonymous_bytes() - base
        assert abs(held - expected) < 0.03 * tokens * LAYERS * HEADS * ENTRY, (held, expected)

    with new_store(directory=tmp_path) as store:
        close_to(0)  # reserving takes nothing
        fill(store, tokens)
        exact = tokens * LAYERS * HEADS * ENTRY
        assert exact <= total(store) <= 1.01 * exact
        close_to(total(store))
        for layer in range(LAYERS):
            store.apply(layer, Plan(keep=tuple(torch.arange(h, tokens, 2) for h in range(HEADS))))
        assert total(store) <= 0.5 * exact + tokens * LAYERS * HEADS * 2 + HEADS * LAYERS * 3 * PAGE
        close_to(total(store))
        for layer in range(LAYERS):
            store.apply(layer, Plan(demote=(Demotion(oldest=2048, codec="int4"),)))
        close_to(total(store))
        for layer in range(LAYERS):
            store.apply(layer, Plan(demote=(Demotion(oldest=4096, tier="disk"),)))
        held = store.bytes()
        assert held[("disk", "int4")] > 0
        assert held[("disk", "raw")] > 0
        close_to(held[("host", "raw")] + held.get(("host", "int4"), 0))
        store.truncate(5000)
        close_to(sum(n for (tier, _), n in store.bytes().items() if tier == "host"))
    close_to(0)
    assert total(store) == 0


def test_closing_frees_at_once_although_a_segment_is_still_held() -> None:
    store = new_store()
    fill(store, 4000)
    segment = store.segments(0)[0]
    before = anonymous_bytes()
    store.close()
    assert before - anonymous_bytes() > 0.97 * 4000 * LAYERS * HEADS * ENTRY
    assert not segment.k[:, :4000].any()  # zeros, and no crash
    store.close()


def test_growth_never_moves_an_entry() -> None:
    with new_store() as store:
        fill(store, 10)
        address = store.segments(0)[0].k.data_ptr()
        fill(store, 3000)
        assert store.segments(0)[0].k.data_ptr() == address


def test_one_raw_segment_is_decoded_without_a_copy() -> None:
    with new_store() as store:
        fill(store, 100)
        (segment,) = store.segments(0)
        assert store.decoded(0).k.data_ptr() == segment.k.data_ptr()


def test_a_segment_is_a_snapshot_of_lengths_and_appends_keep_its_version() -> None:
    with new_store() as store:
        fill(store, 100)
        (before,) = store.segments(0)
        fill(store, 1)
        (after,) = store.segments(0)
        assert before.lengths.tolist() == [100] * HEADS
        assert after.lengths.tolist() == [101] * HEADS
        assert before.version == after.version
        store.apply(0, Plan(keep=(torch.arange(50),) * HEADS))
        assert store.segments(0)[0].version != after.version
        assert store.segments(1)[0].version == after.version
        store.truncate(40)
        assert store.segments(1)[0].version != after.version


def test_positions_exist_only_after_an_eviction() -> None:
    with new_store() as store:
        fill(store, 100)
        store.truncate(90)
        fill(store, 10)
        assert store.segments(0)[0].positions is None
        store.apply(0, Plan(keep=(torch.arange(50),) * HEADS))  # the front: still consecutive
        assert store.segments(0)[0].positions is None
        store.apply(0, Plan(keep=(torch.arange(10, 50),) * HEADS))  # the end of it too
        assert store.segments(0)[0].positions is None
        assert store.segments(0)[0].start == 10
        store.apply(0, Plan(keep=(torch.arange(0, 40, 2),) * HEADS))
        assert store.segments(0)[0].positions is not None


# --------------------------------------------------------------------------- what callers get wrong


def test_a_sequence_that_outgrows_its_store_is_told() -> None:
    with new_store(capacity=100) as store:
        fill(store, 100)
        k = torch.zeros(1, HEADS, D, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="room for 100"):
            store.append(0, k, k, torch.tensor([100]))
        assert store.lengths(0) == [100] * HEADS


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ((torch.arange(5),) * 3, "3 heads"),
        ((torch.tensor([3, 3]),) * HEADS, "ascending"),
        ((torch.tensor([4, 3]),) * HEADS, "ascending"),
        ((torch.tensor([-1, 3]),) * HEADS, "ascending"),
        ((torch.tensor([3, 10]),) * HEADS, "below 10"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(keep: tuple[torch.Tensor, ...], said: str) -> None:
    with new_store() as store:
        fill(store, 10)
        before = store.segments(0)[0]
        with pytest.raises(ValueError, match=said):
            store.apply(0, Plan(keep=keep))
        with pytest.raises(ValueError, match="multiple of 64"):
            store.apply(0, Plan(demote=(Demotion(oldest=10, codec="int8"),)))
        assert store.segments(0)[0] is before


def test_roll_back_beyond_the_end_is_refused() -> None:
    with new_store() as store:
        fill(store, 10)
        for length in (-1, 11):
            with pytest.raises(ValueError, match="cannot roll back"):
                store.truncate(length)


def test_a_prefix_that_does_not_fit_is_refused() -> None:
    with new_store() as source, new_store() as store:
        fill(source, 100)
        layers = [source.segments(layer) for layer in range(LAYERS)]
        for bad, length, said in [
            (layers[:-1], 100, "layers"),
            (layers, 50, "outside 0 to 49"),
            (layers, 1 << 18, "capacity"),
        ]:
            with pytest.raises(ValueError, match=said):
                store.adopt(bad, length)
        other = SequenceStore(layers=LAYERS, heads=HEADS, head_dim=32, dtype=torch.bfloat16, capacity=200)
        with pytest.raises(ValueError, match="another model"):
            other.adopt(layers, 100)
        store.adopt(layers, 100)
        assert (store.length, total(store)) == (100, 0)
        assert store.shared_bytes() == 100 * LAYERS * HEADS * ENTRY
        with pytest.raises(ValueError, match="only an empty store"):
            store.adopt(layers, 100)


def test_an_adopted_prefix_is_copied_only_when_a_plan_drops_some_of_it() -> None:
    with new_store() as source, new_store() as store:
        fill(source, 100)
        before = source.decoded(0).k[:, :100].clone()
        store.adopt([source.segments(layer) for layer in range(LAYERS)], 100)
        fill(store, 50)
        everything = torch.arange(100)
        store.apply(0, Plan(keep=(torch.cat([everything, torch.arange(120, 150)]),) * HEADS))
        assert len(store.segments(0)) == 2  # the prefix stayed shared
        store.apply(0, Plan(keep=(torch.arange(0, 130, 2),) * HEADS))
        (own,) = store.segments(0)
        assert torch.equal(own.k[:, :50], before[:, ::2])
        assert torch.equal(source.decoded(0).k[:, :100], before)


# --------------------------------------------------------------------------- the disk tier


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def refuses_and_is_unchanged(store: SequenceStore, plan: Plan) -> None:
    before = [(s.codec, s.tier, s.lengths.tolist()) for s in store.segments(0)]
    k, held = store.decoded(0).k.clone(), store.bytes()
    with pytest.raises(ValueError, match="cannot move entries to disk"):
        store.apply(0, plan)
    assert before == [(s.codec, s.tier, s.lengths.tolist()) for s in store.segments(0)]
    n = store.lengths(0)[0]
    assert torch.equal(store.decoded(0).k[:, :n], k[:, :n])
    assert {key: n for key, n in store.bytes().items() if n} == {key: n for key, n in held.items() if n}


def test_a_full_disk_leaves_the_store_unchanged(small_disk: Path) -> None:
    with new_store(directory=small_disk) as store:
        fill(store, 2000)
        store.apply(0, Plan(demote=(Demotion(oldest=64, tier="disk"),)))  # 64 KiB fit, 1 MiB does not
        refuses_and_is_unchanged(store, Plan(demote=(Demotion(oldest=1024, tier="disk"),)))
        store.apply(0, Plan(demote=(Demotion(oldest=128, tier="disk"),)))
        assert store.bytes()[("disk", "raw")] == 128 * HEADS * ENTRY


@pytest.mark.parametrize("succeed", [0, 1, 3, 7])
def test_space_that_runs_out_half_way_leaves_the_store_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, succeed: int
) -> None:
    real, calls = os.posix_fallocate, [0]

    def limited(descriptor: int, offset: int, length: int) -> None:
        calls[0] += 1
        if calls[0] > succeed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, length)

    with new_store(directory=tmp_path) as store:
        fill(store, 300)
        store.apply(0, Plan(keep=tuple(torch.arange(h, 300) for h in range(HEADS))))
        monkeypatch.setattr(os, "posix_fallocate", limited)
        refuses_and_is_unchanged(store, Plan(demote=(Demotion(oldest=128, codec="int8", tier="disk"),)))


@pytest.mark.parametrize("place", ["file/below", "missing", "/proc"])
def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file is no directory")
    with new_store(directory=tmp_path / place) as store:
        fill(store, 128)
        refuses_and_is_unchanged(store, Plan(demote=(Demotion(oldest=64, tier="disk"),)))


def test_a_limit_on_file_sizes_is_said(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with new_store(directory=tmp_path) as store:
        fill(store, 128)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            refuses_and_is_unchanged(store, Plan(demote=(Demotion(oldest=64, tier="disk"),)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_files_have_no_name_and_go_with_the_store(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    with new_store(directory=tmp_path) as store:
        fill(store, 128)
        store.apply(0, Plan(demote=(Demotion(oldest=128, tier="disk"),)))
        assert os.listdir(tmp_path) == []
        assert descriptors() > before
    assert descriptors() == before


# --------------------------------------------------------------------------- arenas


@pytest.mark.parametrize("width", [1, 3, 80, 128])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int32])
def test_the_ledger_of_an_arena_is_what_the_kernel_says(
    width: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    for tier in ("host", "disk"):
        arena = open_arena(3, 5000, width, dtype, tier=tier, directory=tmp_path)
        assert isinstance(arena, (HostArena, DiskArena))
        spans = [(0, 17), (0, 5000), (130, 1300)]
        for head, (first, last) in enumerate(spans):
            assert arena.prepare(head, first, last) >= last
            arena.data[head, first:last] = 1

        def real(arena: HostArena | DiskArena = arena) -> int:
            return arena.resident() if isinstance(arena, HostArena) else arena.allocated()

        assert arena.nbytes() == real()
        for head, (first, last) in enumerate([(0, 3), (2000, 3000), (130, 130)]):
            arena.retain(head, first, last)
            assert bool((arena.data[head, first:last] == 1).all())
        assert arena.nbytes() == real()
        arena.close()
        assert arena.nbytes() == real() == 0 if isinstance(arena, HostArena) else arena.nbytes() == 0
        arena.close()


def test_heads_never_share_a_memory_page() -> None:
    arena = open_arena(5, 37, 80, torch.bfloat16)
    assert isinstance(arena, HostArena)
    assert arena.data.stride(0) * 2 % PAGE == 0
    assert arena.data.shape == (5, 37, 80)


def test_address_space_that_cannot_be_reserved_is_said() -> None:
    with pytest.raises(ValueError, match="address space"):
        SequenceStore(layers=1, heads=1 << 10, head_dim=128, dtype=torch.float32, capacity=1 << 40)
