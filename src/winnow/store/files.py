"""A sequence in a file: written whole or not at all, checked bit by bit when it is read.

Layout, little-endian::

    8 bytes  magic "WINNOWKV"        4 bytes  format version
    8 bytes  length of the index     4 bytes  CRC-32 of the index
    8 bytes  where the index begins
    tensors  each at a multiple of 64 bytes, valid entries only, head after head
    index    JSON: the caller's header, the shape of the store, its runs and tensors

Entries are written in the codec that they are stored in, and in fewer bytes without loss where the caller
says so (:mod:`winnow.store.packing`). CRC-32, of the bytes before packing, finds torn and rotten files, not
forged ones. Files of versions 1 and 2, which have the index in front, are read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.store.codecs import ENTRIES, Plane, codec_named, is_codec
from winnow.store.form import StoredRows, stored_rows
from winnow.store.packing import pack, unpack
from winnow.store.run import Run
from winnow.store.sequence import SequenceStore
from winnow.types import Factors, Rotary

__all__ = ["StoreFileError", "load", "read", "read_header", "save", "write"]

MAGIC = b"WINNOWKV"
VERSION = 3
_HEAD = struct.Struct("<8sIQI")
_PLACE = struct.Struct("<Q")
_INDEX_FIRST = (1, 2)
_ALIGN = 64
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
}
_TENSOR = "@tensor"  # marks the record of a tensor in a header
_INDEX_LIMIT = 1 << 30  # a longer index is taken for damage before memory is asked for


RotaryOf = Callable[[int], Rotary | None]
"""The rotation of a layer of a store."""


class StoreFileError(ValueError):
    """A sequence file cannot be written, or is not what it should be."""


# --------------------------------------------------------------------------- writing


def save(store: SequenceStore, path: str | Path, header: Mapping[str, Any], *, packed: bool = False) -> None:
    """Write a sequence to ``path``, atomically.

    The data goes to a temporary file in the same directory, is forced to the disk, and takes the
    name ``path`` only then. What was at ``path`` before stays there if anything fails.

    Parameters
    ----------
    store : SequenceStore
        Entries of a pool that it reads are written too.
    path : path
    header : mapping
        JSON values and tensors that :func:`load` gives back, such as fingerprints and token ids.
    packed : bool
        Spend time to write fewer bytes; what is read back is the same bit by bit.

    Raises
    ------
    StoreFileError
        No space, no permission or no such directory.
    """
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(store, file, header, packed=packed)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class _Tensors:
    """Tensors on their way into a file, and the record of each for the index."""

    def __init__(self, file: BufferedIOBase, *, packed: bool) -> None:
        self._file = file
        self._packed = packed
        self._base = self.end = _aligned(_HEAD.size + _PLACE.size)
        self.records: list[dict[str, int]] = []
        file.write(bytes(self._base))  # the head is known when all is written

    def add(self, parts: list[Tensor]) -> int:
        """Write a tensor, given as its parts (one per head); return its number."""
        begin = _aligned(self.end)
        self._file.write(bytes(begin - self.end))
        self.end, size, crc = begin, 0, 0
        for part in parts:
            part = part.detach().cpu().contiguous()
            buffer = _buffer(part)
            crc, size = zlib.crc32(buffer, crc), size + len(buffer)
            for piece in pack(part) if self._packed else (buffer,):
                self.end += self._file.write(piece)
        record = {"offset": begin - self._base, "bytes": size, "crc": crc}
        if self._packed:
            record["packed"] = self.end - begin
        self.records.append(record)
        return len(self.records) - 1


def write(
    store: SequenceStore, file: BufferedIOBase, header: Mapping[str, Any], *, packed: bool = False
) -> int:
    """Write a sequence to an open file, from its position 0 on; see :func:`save`.

    Until it returns, the file has no valid beginning.

    Returns
    -------
    int
        Bytes of the file.
    """
    tensors = _Tensors(file, packed=packed)
    index = _index(store, header, tensors)
    place = tensors.end
    file.write(index)
    file.seek(0)
    file.write(_HEAD.pack(MAGIC, VERSION, len(index), zlib.crc32(index)) + _PLACE.pack(place))
    return place + len(index)


def _index(store: SequenceStore, header: Mapping[str, Any], tensors: _Tensors) -> bytes:
    """Write all tensors; return the index."""
    add = tensors.add
    runs = []
    for layer in range(store.layers):
        of_layer = []
        for segment in store.segments(layer):
            stored = stored_rows(segment)
            of_layer.append(
                {
                    "codec": segment.codec,
                    "tier": segment.tier,
                    "start": stored.start,
                    "lengths": stored.lengths,
                    "planes": [add(parts) for parts in stored.planes],
                    "positions": None if stored.positions is None else add(stored.positions),
                    "bias": None if stored.bias is None else add(stored.bias),
                    "batches": None if stored.batches is None else add(stored.batches),
                    "factors": None if stored.factors is None else _factor_record(stored.factors, add),
                }
            )
        runs.append(of_layer)
    shape = store.shape
    index = {
        "header": _recorded(dict(header), add),
        "store": {
            "layers": store.layers,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "capacity": shape.capacity,
            "length": store.length,
        },
        "runs": runs,
        "tensors": tensors.records,
    }
    return json.dumps(index, separators=(",", ":")).encode()


def _recorded(value: Any, add: Callable[[list[Tensor]], int]) -> Any:
    """A header, with the record of each tensor in its place."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        assert kind in _DTYPES, f"tensors of {kind} are not written"
        return {_TENSOR: add([value]), "dtype": kind, "shape": list(value.shape), "cpu": value.is_cpu}
    if isinstance(value, Mapping):
        return {key: _recorded(one, add) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_recorded(one, add) for one in value]
    return value


def _factor_record(factors: Factors, add: Callable[[list[Tensor]], int]) -> dict[str, Any]:
    return {
        "start": factors.start,
        "rows": len(factors.left),
        "left": add([factors.left]),
        "right": add([factors.right]),
        "turned": factors.rotary is not None,
    }


# --------------------------------------------------------------------------- reading


def read_header(path: str | Path) -> dict[str, Any]:
    """The caller's header of a sequence file, without its entries; of tensors the records.

    Raises
    ------
    StoreFileError
        The file is missing, foreign, torn or damaged.
    """
    with _opened(Path(path)) as file:
        header = _read_index(file, Path(path))[0]["header"]
    assert isinstance(header, dict)
    return header


def load(
    path: str | Path,
    expect: Mapping[str, Any] | None = None,
    *,
    device: str | torch.device = "cpu",
    directory: str | Path | None = None,
    rotary: RotaryOf | None = None,
) -> tuple[SequenceStore, dict[str, Any]]:
    """Read a sequence back.

    Parameters
    ----------
    path : path
    expect : mapping, optional
        Values that the header must have, such as the fingerprints of model and recipe.
    device : str or torch.device
        Where attention will run.
    directory : path, optional
        Where entries of the disk tier go.
    rotary : callable, optional
        The rotation of a layer of the store, for keys that are rebuilt before they are turned.

    Returns
    -------
    store : SequenceStore
    header : dict

    Raises
    ------
    StoreFileError
        The file is missing, foreign, torn, damaged or of another model or recipe.
    """
    path = Path(path)
    with _opened(path) as file:
        return read(file, path, expect, device=device, directory=directory, rotary=rotary)


def read(
    file: BufferedIOBase,
    path: Path,
    expect: Mapping[str, Any] | None = None,
    *,
    device: str | torch.device = "cpu",
    directory: str | Path | None = None,
    rotary: RotaryOf | None = None,
) -> tuple[SequenceStore, dict[str, Any]]:
    """Read what :func:`write` wrote to an open file, which errors call ``path``; see :func:`load`."""
    index, base = _read_index(file, path)
    header: dict[str, Any] = index["header"]
    for key, value in (expect or {}).items():
        if header.get(key) != value:
            raise StoreFileError(
                f"{path} was saved with another {key} ({header.get(key)!r}, not {value!r}); "
                f"open it with the {key} it was saved with"
            )
    try:
        tensors = index["tensors"]
        header = {key: _read_recorded(file, path, tensors, base, one, device) for key, one in header.items()}
        return _fill(file, path, index, base, device, directory, rotary), header
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, f"its index does not make sense ({error})") from error


def _read_recorded(
    file: BufferedIOBase,
    path: Path,
    tensors: list[dict[str, int]],
    base: int,
    value: Any,
    device: str | torch.device,
) -> Any:
    """A header's value, with tensors in the place of their records."""
    if isinstance(value, list):
        return [_read_recorded(file, path, tensors, base, one, device) for one in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR not in value:
        return {key: _read_recorded(file, path, tensors, base, one, device) for key, one in value.items()}
    entry, dtype = tensors[value[_TENSOR]], _DTYPES[value["dtype"]]
    if entry["bytes"] != math.prod(value["shape"]) * dtype.itemsize or entry["offset"] < 0:
        raise _damaged(path, "a tensor of its header has the wrong size")
    tensor = _read_tensor(file, path, base, entry).view(dtype).view(value["shape"])
    return tensor if value["cpu"] else tensor.to(device)


def _fill(
    file: BufferedIOBase,
    path: Path,
    index: dict[str, Any],
    base: int,
    device: str | torch.device,
    directory: str | Path | None,
    rotary: RotaryOf | None,
) -> SequenceStore:
    form = index["store"]
    if not getattr(_DTYPES.get(form["dtype"]), "is_floating_point", False):
        raise _damaged(path, f"it names an unknown type {form['dtype']!r}")
    store = SequenceStore(
        layers=form["layers"],
        heads=form["heads"],
        head_dim=form["head_dim"],
        dtype=_DTYPES[form["dtype"]],
        capacity=form["capacity"],
        device=device,
        directory=directory,
    )
    try:
        if len(index["runs"]) != store.layers or not 0 <= form["length"] <= form["capacity"]:
            raise _damaged(path, "layers or length do not fit")
        for layer, runs in enumerate(index["runs"]):
            for record in runs:
                _fill_run(file, path, index["tensors"], base, store, layer, record, rotary)
        store.restore(form["length"])
    except BaseException:
        store.close()
        raise
    return store


def _fill_run(
    file: BufferedIOBase,
    path: Path,
    tensors: list[dict[str, int]],
    base: int,
    store: SequenceStore,
    layer: int,
    record: dict[str, Any],
    rotary: RotaryOf | None,
) -> None:
    shape, lengths = store.shape, record["lengths"]
    if not is_codec(record["codec"]):
        raise StoreFileError(
            f"{path} holds entries in an unknown codec {record['codec']!r}; "
            "read it with the version that wrote it"
        )
    if record["tier"] not in ("device", "host", "disk"):
        raise _damaged(path, f"it names an unknown tier {record['tier']!r}")
    codec = codec_named(record["codec"])
    planes = codec.planes(shape.head_dim, shape.dtype)
    once = any(plane.once for plane in planes)
    page = 1 if codec.name == "raw" else ENTRIES
    sound = len(lengths) == shape.heads and len(record["planes"]) == len(planes)
    if not sound or any(not 0 <= n <= shape.capacity or n % page for n in lengths):
        raise _damaged(path, f"a run of layer {layer} has impossible lengths")

    def read(number: int, plane: Plane, counts: list[int]) -> list[Tensor]:
        entry, size = tensors[number], sum(counts) * plane.width * plane.dtype.itemsize
        if entry["bytes"] != size or entry["offset"] < 0:
            raise _damaged(path, f"a tensor of layer {layer} has the wrong size")
        tensor = _read_tensor(file, path, base, entry)
        return list(torch.split(tensor.view(plane.dtype).view(-1, plane.width), counts))

    def read_side(name: str, dtype: torch.dtype, entries: int = 1) -> list[Tensor] | None:
        # Files of version 1 have positions alone.
        if record.get(name) is None:
            return None
        table = Plane(name=name, dtype=dtype, width=1)
        return [part[:, 0] for part in read(record[name], table, [n // entries for n in lengths])]

    def read_factors() -> Factors | None:
        found, rank = record.get("factors"), codec.key_rank
        if (found is None) != (rank is None):
            raise _damaged(path, f"keys of layer {layer} lack what rebuilds them")
        if found is None or rank is None:
            return None
        if found["turned"] and rotary is None:
            raise StoreFileError(
                f"{path} holds keys that a model's rotation rebuilds; open it with load(..., rotary=...)"
            )
        start, rows, size = int(found["start"]), int(found["rows"]), shape.head_dim
        if start < 0 or rows < 1 or start + rows > shape.capacity:
            raise _damaged(path, f"the factors of layer {layer} do not fit its positions")
        flat = Plane(name="right", dtype=shape.dtype, width=rank * size)
        (left,) = read(found["left"], Plane(name="left", dtype=shape.dtype, width=rank), [rows])
        (right,) = read(found["right"], flat, [shape.heads])
        return Factors(
            left=left,
            right=right.view(shape.heads, rank, size),
            start=start,
            rotary=rotary(layer) if found["turned"] and rotary is not None else None,
        )

    positions = read_side("positions", torch.int32)
    if any(len(p) and (int(p[0]) < 0 or bool((p.diff() <= 0).any())) for p in positions or ()):
        raise _damaged(path, f"positions of layer {layer} do not ascend")
    batches = read_side("batches", torch.int32, ENTRIES)
    pages = -(-shape.capacity // ENTRIES)
    if once != (batches is not None) or any(
        len(b) and not 0 <= int(b.min()) <= int(b.max()) <= pages for b in batches or ()
    ):
        raise _damaged(path, f"the shared rows of layer {layer} do not fit its pages")
    used = [int(b.max()) + 1 if len(b) else 0 for b in batches or ()]
    stored = StoredRows(
        planes=[
            read(number, plane, used if plane.once else [n // plane.entries for n in lengths])
            for number, plane in zip(record["planes"], planes, strict=True)
        ],
        lengths=lengths,
        start=int(record["start"]),
        positions=positions,
        bias=read_side("bias", torch.float32),
        batches=batches,
        factors=read_factors(),
    )
    if (made := stored.factors) is not None:
        ends = [(int(p[0]), int(p[-1])) for p in positions or () if len(p)]
        if positions is None:
            ends = [(stored.start, stored.start + n - 1) for n in lengths if n]
        if any(first < made.start or last >= made.start + len(made.left) for first, last in ends):
            raise _damaged(path, f"the factors of layer {layer} do not fit its positions")
    tier = record["tier"] if record["tier"] == "disk" else shape.tier
    plain = positions is None and stored.bias is None and min(lengths) == max(lengths)
    run: Run = store.restored_run(layer, record["codec"], tier, stored.start if plain else None)
    run.restore(stored)


def _read_index(file: BufferedIOBase, path: Path) -> tuple[dict[str, Any], int]:
    """The index, and where its tensors' offsets count from."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:8] != MAGIC:
        raise StoreFileError(f"{path} is not a saved sequence; name a file that session.save wrote")
    _, version, length, crc = _HEAD.unpack(head)
    if not 1 <= version <= VERSION:
        raise StoreFileError(
            f"{path} has format version {version}, this is version {VERSION}; "
            "read it with the version that wrote it"
        )
    size = file.seek(0, os.SEEK_END)
    place, base = _HEAD.size, _aligned(_HEAD.size + length)
    if version not in _INDEX_FIRST:
        file.seek(_HEAD.size)
        pointer = file.read(_PLACE.size)
        if len(pointer) < _PLACE.size:
            raise _damaged(path, "it ends inside its head")
        place, base = _PLACE.unpack(pointer)[0], _aligned(_HEAD.size + _PLACE.size)
    if length > _INDEX_LIMIT or place + length > size:
        raise _damaged(path, "it ends inside its index")
    file.seek(place)
    text = file.read(length)
    if len(text) < length or zlib.crc32(text) != crc:
        raise _damaged(path, "the checksum of its index does not match")
    index = json.loads(text)
    assert isinstance(index, dict)
    end = place + length
    if version in _INDEX_FIRST and index["bytes"]:
        end = base + index["bytes"]
    if size != end:
        raise _damaged(path, f"it has {size} bytes instead of {end}")
    return index, base


def _read_tensor(file: BufferedIOBase, path: Path, base: int, entry: dict[str, int]) -> Tensor:
    tensor = torch.empty(entry["bytes"], dtype=torch.uint8)
    end = file.seek(0, os.SEEK_END)
    file.seek(base + entry["offset"])
    buffer = _buffer(tensor)
    if "packed" in entry:
        if not 0 <= entry["packed"] <= end:
            raise _damaged(path, "a tensor has the wrong size")
        try:
            unpack(memoryview(file.read(entry["packed"])), buffer)
        except ValueError as error:
            raise _damaged(path, f"a tensor cannot be unpacked: {error}") from error
    # readinto of a raw file may stop early; a buffered one does not before the end of the file.
    elif file.readinto(buffer) != entry["bytes"]:
        raise _damaged(path, "it ends inside a tensor")
    if zlib.crc32(buffer) != entry["crc"]:
        raise _damaged(path, "the checksum of a tensor does not match")
    return tensor


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise StoreFileError(
            f"cannot read {path}: {error.strerror}; check the path and its permissions"
        ) from error
    with file:
        yield file


def _buffer(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _damaged(path: Path, why: str) -> StoreFileError:
    return StoreFileError(f"{path} is damaged: {why}; restore it from a copy or save the session again")


def _unwritable(path: Path, error: OSError) -> StoreFileError:
    return StoreFileError(
        f"cannot save to {path}: {error.strerror or error}; free space there or choose another place"
    )
