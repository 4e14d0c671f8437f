"""A saved sequence is whole or absent, and a bad file says what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.store import SequenceStore, StoreFileError, files
from winnow.store.form import stored_rows
from winnow.types import Demotion, Plan

HEADER = {"model": "m1", "recipe": "r1", "tokens": [3, 1, 2]}


def filled(tokens: int = 200, *, heads: int = 2, seed: int = 0) -> SequenceStore:
    store = SequenceStore(layers=2, heads=heads, head_dim=16, dtype=torch.bfloat16, capacity=tokens + 50)
    gen = torch.Generator().manual_seed(seed)
    for layer in range(2):
        k, v = torch.randn(2, tokens, heads, 16, generator=gen).bfloat16()
        store.append(layer, k, v, torch.arange(tokens))
    store.advance(tokens)
    return store


def assert_same(a: SequenceStore, b: SequenceStore) -> None:
    assert (a.length, a.layers, a.capacity, a.shape.dtype) == (b.length, b.layers, b.capacity, b.shape.dtype)
    for layer in range(a.layers):
        x, y = a.decoded(layer), b.decoded(layer)
        assert torch.equal(x.lengths, y.lengths)
        for head, n in enumerate(x.lengths.tolist()):
            assert torch.equal(x.k[head, :n], y.k[head, :n])
            assert torch.equal(x.v[head, :n], y.v[head, :n])
            assert torch.equal(x.positions_of(head), y.positions_of(head))


def test_ragged_entries_and_demoted_ones_come_back(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    with filled() as store:
        store.apply(0, Plan(keep=(torch.arange(0, 200, 3), torch.arange(100))))
        store.apply(1, Plan(demote=(Demotion(oldest=128, tier="disk"),)))
        files.save(store, path, HEADER)
        again, header = files.load(path, {"model": "m1", "recipe": "r1"})
        with again:
            assert header == HEADER
            assert_same(store, again)
            assert store.bytes() == again.bytes()
            # It goes on: the next token follows.
            k = torch.ones(1, 2, 16, dtype=torch.bfloat16)
            for one in (store, again):
                for layer in range(2):
                    one.append(layer, k, k, torch.tensor([200]))
                one.advance(1)
            assert_same(store, again)


def test_only_valid_entries_are_written(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    with filled(1000) as store:
        for layer in range(2):
            store.apply(layer, Plan(keep=(torch.arange(0, 1000, 10),) * 2))
        files.save(store, path, HEADER)
    entries = 2 * 2 * 100
    assert path.stat().st_size < entries * (2 * 16 * 2 + 4) + 2048


def test_an_empty_store_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    with SequenceStore(layers=1, heads=1, head_dim=4, dtype=torch.float32, capacity=8) as store:
        files.save(store, path, {})
    again, header = files.load(path)
    assert (again.length, header) == (0, {})


def test_the_header_is_read_without_the_entries(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    files.save(filled(), path, HEADER)
    assert files.read_header(path) == HEADER


@pytest.mark.parametrize("packed", [False, True])
def test_a_header_may_hold_tensors(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "s.kv"
    found = {
        "sums": torch.rand(2, 3),
        "last": [[torch.arange(4, dtype=torch.int32), 1]],
        "no": torch.empty(0, 5),
    }
    with filled() as store:
        files.save(
            store, path, {**HEADER, "found": found, "v": store.segments(0)[0].v[:, 3:5]}, packed=packed
        )
        again, header = files.load(path, {"model": "m1"})
        assert torch.equal(header.pop("v"), store.segments(0)[0].v[:, 3:5])
        assert_same(store, again)
    back = header.pop("found")
    assert header == HEADER
    assert torch.equal(back["sums"], found["sums"])
    assert back["no"].shape == (0, 5)
    ((last, one),) = back["last"]
    assert (last.dtype, last.tolist(), one) == (torch.int32, [0, 1, 2, 3], 1)
    assert files.read_header(path)["found"]["sums"]["shape"] == [2, 3], "tensors stay where they are"
    with pytest.raises(AssertionError, match="complex64 are not written"):
        files.save(store, path, {"z": torch.zeros(1, dtype=torch.complex64)})


def test_a_tensor_of_a_header_that_does_not_fit_is_damage(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "s.kv"
    recorded = files._recorded

    def wrong(value: Any, add: Any) -> Any:
        record = recorded(value, add)
        return {**record, "shape": [1, 3]} if isinstance(value, torch.Tensor) else record

    monkeypatch.setattr(files, "_recorded", wrong)
    files.save(filled(), path, {"sums": torch.rand(2, 3)})
    with pytest.raises(StoreFileError, match="a tensor of its header has the wrong size"):
        files.load(path)


@pytest.mark.parametrize("key", ["model", "recipe"])
def test_a_file_of_another_model_or_recipe_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "s.kv"
    files.save(filled(), path, HEADER)
    with pytest.raises(StoreFileError, match=f"another {key}"):
        files.load(path, {key: "other"})


def test_every_torn_length_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    files.save(filled(20), path, HEADER)
    whole = path.read_bytes()
    torn = tmp_path / "torn.kv"
    for length in [*range(60), *range(60, len(whole), 97), len(whole) - 1]:
        torn.write_bytes(whole[:length])
        with pytest.raises(StoreFileError, match=r"not a saved sequence|damaged"):
            files.load(torn)
    torn.write_bytes(whole + b"\0")
    with pytest.raises(StoreFileError, match="damaged"):
        files.load(torn)


def test_every_flipped_byte_of_content_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    with filled(20) as store:
        files.save(store, path, HEADER)
        whole = bytearray(path.read_bytes())
        silent = 0
        for at in range(0, len(whole), 13):
            whole[at] ^= 0x10
            path.write_bytes(whole)
            try:
                again, _ = files.load(path)
            except StoreFileError:
                pass
            else:  # padding between tensors belongs to nobody
                assert_same(store, again)
                silent += 1
            whole[at] ^= 0x10
        assert silent * 13 < 16 * 64


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(100), b"WINNOWKV", b"{}", os.urandom(4096)])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.kv"
    path.write_bytes(content)
    with pytest.raises(StoreFileError, match="not a saved sequence"):
        files.load(path)


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    files.save(filled(), path, HEADER)
    content = bytearray(path.read_bytes())
    content[8] = 9
    path.write_bytes(content)
    with pytest.raises(StoreFileError, match="format version 9"):
        files.load(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 1000])
def test_packing_loses_nothing(tmp_path: Path, dtype: torch.dtype, tokens: int) -> None:
    """Also what is no number, and codecs' bytes, positions and biases."""
    store = SequenceStore(layers=2, heads=2, head_dim=64, dtype=dtype, capacity=tokens + 50)
    gen = torch.Generator().manual_seed(tokens)
    for layer in range(2):
        k, v = torch.randn(2, tokens, 2, 64, generator=gen).to(dtype)
        k[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, torch.finfo(dtype).tiny])
        store.append(layer, k, v, torch.arange(tokens))
    store.advance(tokens)
    store.apply(0, Plan(keep=(torch.arange(0, tokens, 2), torch.arange(tokens))))
    if tokens > 64:
        store.apply(1, Plan(demote=(Demotion(oldest=128, codec="int8"),)))
    plain, packed = tmp_path / "plain.kv", tmp_path / "packed.kv"
    with store:
        files.save(store, plain, HEADER)
        files.save(store, packed, HEADER, packed=True)
        first, second = files.load(plain)[0], files.load(packed)[0]
    with first, second:
        for layer in range(2):
            for x, y in zip(first.segments(layer), second.segments(layer), strict=True):
                a, b = stored_rows(x), stored_rows(y)
                for one, other in zip(
                    [*a.planes, a.positions or []], [*b.planes, b.positions or []], strict=True
                ):
                    for mine, theirs in zip(one, other, strict=True):
                        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    if tokens == 1000:
        shrinks = {torch.bfloat16: 0.72, torch.float16: 0.9, torch.float32: 0.9}[dtype]
        assert packed.stat().st_size < shrinks * plain.stat().st_size


def test_damage_in_a_packed_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    with filled(300) as store:
        files.save(store, path, HEADER, packed=True)
    content = path.read_bytes()
    place = int.from_bytes(content[24:32], "little")
    inside = [
        64 + entry["offset"] + at
        for entry in json.loads(content[place:])["tensors"]
        for at in range(entry["packed"])
    ]
    for at in random.Random(0).sample(inside, 60):
        damaged = bytearray(content)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(StoreFileError, match="damaged"):
            files.load(path)


@pytest.mark.parametrize("version", [1, 2])
def test_files_with_the_index_in_front_are_read(tmp_path: Path, version: int) -> None:
    """As versions 1 and 2 wrote them."""
    path = tmp_path / "s.kv"
    with filled(100) as store:
        files.save(store, path, HEADER)
        content = path.read_bytes()
        place = int.from_bytes(content[24:32], "little")
        index = json.loads(content[place:])
        tensors = content[64:place]
        if version == 1:  # it had neither
            for record in (record for runs in index["runs"] for record in runs):
                del record["bias"], record["batches"]
        text = json.dumps({**index, "bytes": len(tensors)}).encode()
        head = files._HEAD.pack(files.MAGIC, version, len(text), zlib.crc32(text))
        old = (head + text).ljust(files._aligned(24 + len(text)), b"\0") + tensors
        path.write_bytes(old)
        again, header = files.load(path)
        with again:
            assert header == HEADER
            assert_same(store, again)
        path.write_bytes(old[:-1])
        with pytest.raises(StoreFileError, match="instead of"):
            files.load(path)


def test_an_index_with_a_right_checksum_but_no_sense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    files.save(filled(), path, HEADER)
    content = path.read_bytes()
    place = int.from_bytes(content[24:32], "little")
    index = json.loads(content[place:])

    def write(changed: dict[str, object]) -> None:
        text = json.dumps(changed).encode()
        head = files._HEAD.pack(files.MAGIC, files.VERSION, len(text), zlib.crc32(text))
        path.write_bytes(head + content[24:place] + text)

    write(index)
    files.load(path)[0].close()
    for change in (
        lambda i: i["store"].pop("heads"),
        lambda i: i["store"].update(heads=3),
        lambda i: i["store"].update(dtype="complex64"),
        lambda i: i["store"].update(length=10**9),
        lambda i: i["runs"].pop(),
        lambda i: i["runs"][0][0].update(lengths=[-1, 401]),
        lambda i: i["runs"][0][0].update(lengths=[10**7, 1]),
        lambda i: i["runs"][0][0].update(codec="nonsense"),
        lambda i: i["runs"][0][0].update(tier="tape"),
        lambda i: i["runs"][0][0].update(planes=[0]),
        lambda i: i["runs"][0][0].update(planes=[0, 99]),
        lambda i: i["runs"][0][0].update(lengths=None),
        lambda i: i["tensors"][0].update(bytes=1 << 40),
        lambda i: i["tensors"][0].update(bytes=-1),
        lambda i: i["tensors"][0].update(offset=-(10**6)),
        lambda i: i["tensors"][0].update(packed=10),
        lambda i: i["tensors"][0].update(packed=1 << 50),
    ):
        changed = json.loads(json.dumps(index))
        change(changed)
        write(changed)
        with pytest.raises(StoreFileError):
            files.load(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreFileError, match="cannot read"):
        files.load(tmp_path / "nowhere.kv")


# --------------------------------------------------------------------------- failures to write


def limit_file_size(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_fsync(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    return monkeypatch.undo


@pytest.mark.parametrize("break_it", [limit_file_size, fail_fsync])
def test_no_space_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[..., Callable[[], None]]
) -> None:
    path = tmp_path / "s.kv"
    with filled(20, seed=1) as old, filled(2000, seed=2) as new:
        files.save(old, path, HEADER)
        mend = break_it(monkeypatch)
        try:
            with pytest.raises(StoreFileError, match="cannot save to"):
                files.save(new, path, HEADER)
        finally:
            mend()
        assert os.listdir(tmp_path) == ["s.kv"]
        assert_same(old, files.load(path)[0])
        assert new.length == 2000  # the store in memory is as it was
        files.save(new, path, HEADER)
        assert_same(new, files.load(path)[0])


@pytest.mark.parametrize("place", ["file/s.kv", "missing/s.kv"])
def test_no_such_place_is_said(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file is no directory")
    with pytest.raises(StoreFileError, match="cannot save to"):
        files.save(filled(), tmp_path / place, HEADER)


def test_no_permission_is_said() -> None:
    # Root may write anywhere but where the kernel itself refuses.
    with pytest.raises(StoreFileError, match="cannot save to"):
        files.save(filled(), "/proc/s.kv", HEADER)


def test_a_directory_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "s.kv").mkdir()
    with pytest.raises(StoreFileError, match="cannot save to"):
        files.save(filled(), tmp_path / "s.kv", HEADER)
    assert os.listdir(tmp_path) == ["s.kv"]


def test_interruption_while_writing_leaves_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.save(filled(), tmp_path / "s.kv", HEADER)
    assert os.listdir(tmp_path) == []


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_files import HEADER, filled, files
stores = [filled(4000, seed=s) for s in (1, 2)]
print("ready", flush=True)
for n in range(10**6):
    files.save(stores[n % 2], Path({path!r}), HEADER)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    wanted = [filled(4000, seed=seed) for seed in (1, 2)]
    files.save(wanted[0], path, HEADER)
    script = _WRITER.format(tests=str(Path(__file__).parent), path=str(path))
    for wait in (0.05, 0.111, 0.163, 0.207):
        writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with files.load(path)[0] as store:
            same = [torch.equal(store.decoded(0).k[:, :9], one.decoded(0).k[:, :9]) for one in wanted]
            assert sum(same) == 1
            assert_same(store, wanted[same.index(True)])
