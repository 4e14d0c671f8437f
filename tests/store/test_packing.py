"""Packing is a bijection on bytes, and what it did not write it refuses."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.store import packing
from winnow.store.packing import pack, unpack

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int32, torch.int64]


def packed(tensor: torch.Tensor) -> bytes:
    return b"".join(pack(tensor))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(
    dtype=st.sampled_from(DTYPES), data=st.binary(max_size=4096), block=st.sampled_from([64, 1024, 1 << 20])
)
@settings(max_examples=200, deadline=None)
def test_every_pattern_of_bits_comes_back(dtype: torch.dtype, data: bytes, block: int) -> None:
    numbers = len(data) // dtype.itemsize
    tensor = torch.tensor(list(data[: numbers * dtype.itemsize]), dtype=torch.uint8).view(dtype)
    before, packing._BLOCK = packing._BLOCK, block
    try:
        stream = packed(tensor)
    finally:
        packing._BLOCK = before
    out = bytearray(len(raw(tensor)))
    unpack(memoryview(stream), memoryview(out))
    assert bytes(out) == raw(tensor)


@pytest.mark.parametrize("kind", ["normal", "constant", "noise"])
def test_long_tensors_shrink_where_there_is_something_to_gain(kind: str) -> None:
    n, gen = 3_000_001, torch.Generator().manual_seed(0)
    made = {
        "normal": torch.randn(n, generator=gen).bfloat16(),
        "constant": torch.full((n,), 0.1).bfloat16(),
        "noise": torch.randint(-32768, 32767, (n,), generator=gen).to(torch.int16).view(torch.bfloat16),
    }[kind]
    stream = packed(made)
    least, most = {"normal": (0.6, 0.7), "constant": (0.0, 0.01), "noise": (0.99, 1.001)}[kind]
    assert least < len(stream) / (2 * n) < most
    out = bytearray(2 * n)
    unpack(memoryview(stream), memoryview(out))
    assert bytes(out) == raw(made)


def test_what_it_did_not_write_is_refused() -> None:
    stream = packed(torch.randn(1000).bfloat16())
    for wrong in (stream[:-1], stream[:3], stream[:-600], b"", stream + stream, b"\x07" * 200):
        with pytest.raises(ValueError, match=r"block|plane"):
            unpack(memoryview(wrong), memoryview(bytearray(2000)))
    with pytest.raises(ValueError, match="block"):
        unpack(memoryview(stream), memoryview(bytearray(1000)))


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"winnow-llm\[serve\]"):
        packed(torch.randn(10))
