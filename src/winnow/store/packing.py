"""Fewer bytes for the same numbers: entries in a file without loss.

The exponents of keys and values take a handful of values, their signs and mantissas all of them. So numbers
are turned left by one bit, which brings the exponent together, and cut into planes of bytes: the plane with
the exponents shrinks to 2 or 3 of 8 bits, and the others stay as they are. That is what ZipNN (arXiv
2411.05239) and DFloat11 (arXiv 2504.11651) do to weights. The coder is Zstandard at its first level.

A stream is a row of blocks::

    4 bytes  bytes of the block before packing
    1 byte   bytes of a number      1 byte  whether numbers were turned
    per plane, the lowest first: 4 bytes length, then as many bytes; as long as the plane where it stays plain
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    import zstandard

__all__ = ["pack", "unpack"]

_HEAD = struct.Struct("<IBB")
_LENGTH = struct.Struct("<I")
_BLOCK = 1 << 20  # bytes: small enough for a core's cache
_SAMPLE = 1 << 13
_LEVEL = 1
# Bits per byte above which a plane is not worth the time.
_WORTH = 7.5

_Bytes = npt.NDArray[np.uint8]


def _library() -> ModuleType:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ValueError(
            "packed entries need the package zstandard; install it with winnow-llm[serve]"
        ) from error
    return zstandard


def pack(tensor: Tensor) -> Iterator[bytes]:
    """The blocks of a contiguous tensor on the host.

    Raises
    ------
    ValueError
        The package zstandard is missing.
    """
    # What unpacks knows the size of a plane, and believes no other.
    coder = _library().ZstdCompressor(level=_LEVEL, write_content_size=False)
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    item = tensor.element_size()
    turned = tensor.is_floating_point() and item > 1
    for first in range(0, len(flat), _BLOCK):
        block = flat[first : first + _BLOCK]
        yield _HEAD.pack(len(block), item, turned)
        numbers = _turned(block, item, 1).view(np.uint8) if turned else block
        for plane in range(item):
            packed = _packed(coder, np.ascontiguousarray(numbers[plane::item]))
            yield _LENGTH.pack(len(packed))
            yield packed


def unpack(stream: memoryview, out: memoryview) -> None:
    """Write what a stream of blocks says into ``out``.

    Raises
    ------
    ValueError
        The stream is damaged or of another length, or the package zstandard is missing.
    """
    library = _library()
    coder = library.ZstdDecompressor()
    at = done = 0
    try:
        while at < len(stream):
            size, item, turned = _HEAD.unpack_from(stream, at)
            at += _HEAD.size
            if item not in (1, 2, 4, 8) or size % item or done + size > len(out):
                raise ValueError("a block does not fit")
            numbers = np.empty(size, dtype=np.uint8)
            for plane in range(item):
                (length,) = _LENGTH.unpack_from(stream, at)
                at += _LENGTH.size
                numbers[plane::item] = _unpacked(coder, stream[at : at + length], size // item)
                at += length
            out[done : done + size] = (_turned(numbers, item, -1).view(np.uint8) if turned else numbers).data
            done += size
    except (struct.error, library.ZstdError) as error:
        raise ValueError(f"a block cannot be unpacked ({error})") from error
    if done != len(out):
        raise ValueError("blocks are missing")


def _turned(block: _Bytes, item: int, by: int) -> npt.NDArray[Any]:
    """Numbers turned left by one bit, or right for -1."""
    numbers: npt.NDArray[Any] = block.view(f"<u{item}")
    left = by % (8 * item)
    return (numbers << left) | (numbers >> (8 * item - left))


def _packed(coder: zstandard.ZstdCompressor, plane: _Bytes) -> bytes:
    sample = plane[:: max(1, len(plane) // _SAMPLE)]
    share = np.bincount(sample, minlength=256) / max(len(sample), 1)
    share = share[share > 0]
    if -(share * np.log2(share)).sum() < _WORTH:
        packed: bytes = coder.compress(plane.data)
        if len(packed) < len(plane):
            return packed
    return plane.tobytes()


def _unpacked(coder: zstandard.ZstdDecompressor, packed: memoryview, size: int) -> _Bytes:
    if len(packed) == size:
        return np.frombuffer(packed, dtype=np.uint8)
    plane = coder.decompress(packed, max_output_size=size)
    if len(plane) != size:
        raise ValueError("a plane has the wrong length")
    return np.frombuffer(plane, dtype=np.uint8)
