"""Quantisation: the stated error, and every instruction set bit for bit equal to the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.kernels import backend
from winnow.kernels.quantize import Axis, Quantized, dequantize, quantize
from winnow.kernels.quantize.reference import pack, unpack

ISAS = backend.isas()
BITS = [8, 4, 2]
DTYPES = [torch.float32, torch.bfloat16]


def entries(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Channels of different scale and offset, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(shape[-1], generator=generator) * 2)
    offset = torch.randn(shape[-1], generator=generator) * 5
    return (torch.randn(*shape, generator=generator) * scale + offset).to(dtype)


def same(a: Quantized, b: Quantized) -> None:
    for name in ("codes", "scale", "zero"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.shape == right.shape
            assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), name


def within_half_a_step(x: torch.Tensor, q: Quantized, values: torch.Tensor) -> None:
    along = -1 if q.axis == "token" else -2
    step = q.scale.double().repeat_interleave(q.group, along)
    error = (values.double() - x.double()).abs()
    # float32 rounds the difference, the quotient, the product and the sum: a few times 2^-24 of the
    # largest number that appears, which is the zero or the whole reach.
    zero = torch.zeros_like(step) if q.zero is None else q.zero.double().repeat_interleave(q.group, along)
    slack = (zero.abs() + step * 2**q.bits) * 2**-21
    assert bool((error <= step / 2 + slack).all()), float((error - step / 2).max())


FORMS: list[tuple[Axis, int]] = [
    ("token", 128),
    ("token", 32),
    ("token", 64),
    ("channel", 64),
    ("channel", 16),
]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("axis", "group"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_equals_the_reference(
    isa: str, dtype: torch.dtype, axis: Axis, group: int, bits: int, symmetric: bool
) -> None:
    x = entries(3, 192, 128, dtype=dtype)
    want = quantize(x, bits=bits, axis=axis, group=group, symmetric=symmetric, backend="reference")
    got = quantize(x, bits=bits, axis=axis, group=group, symmetric=symmetric, backend="native")
    same(got, want)
    for out in DTYPES:
        values = dequantize(got, out, backend="native")
        assert values.dtype == out
        assert torch.equal(values, dequantize(want, out, backend="reference"))


@settings(deadline=None, max_examples=80)
@given(
    isa=st.sampled_from(ISAS) if ISAS else st.nothing(),
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]),
    groups=st.integers(1, 5),
    size=st.integers(1, 33),
    other=st.integers(1, 40),
    axis=st.sampled_from(["token", "channel"]),
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    isa: str,
    lead: tuple[int, ...],
    groups: int,
    size: int,
    other: int,
    axis: Axis,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    tokens, width, group = (other, groups * size, size) if axis == "token" else (groups * size, other, size)
    if width * bits % 8:
        width, group = width * 8, group * (8 if axis == "token" else 1)
    x = (entries(*lead, tokens, width, seed=seed) * scale).to(dtype)
    backend.force_isa(isa)
    try:
        got = quantize(x, bits=bits, axis=axis, group=group, symmetric=symmetric, backend="native")
        values = dequantize(got, torch.float32, backend="native")
    finally:
        backend.force_isa(ISAS[0])
    want = quantize(x, bits=bits, axis=axis, group=group, symmetric=symmetric, backend="reference")
    same(got, want)
    assert values.shape == x.shape
    assert torch.equal(values, dequantize(want, torch.float32, backend="reference"))
    within_half_a_step(x, got, values)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("axis", "group"), FORMS)
def test_error_is_half_a_scale(axis: Axis, group: int, bits: int, symmetric: bool) -> None:
    x = entries(2, 128, 128, seed=5)
    q = quantize(x, bits=bits, axis=axis, group=group, symmetric=symmetric)
    within_half_a_step(x, q, dequantize(q, torch.float32))
    # bfloat16 adds its own rounding of the result, nothing else.
    assert torch.equal(dequantize(q, torch.bfloat16), dequantize(q, torch.float32).bfloat16())


def test_outliers_in_few_channels_favour_scales_per_channel() -> None:
    x = entries(256, 128, seed=1)
    error = {
        axis: float((dequantize(quantize(x, bits=4, axis=axis, group=64), torch.float32) - x).abs().mean())
        for axis in ("token", "channel")
    }
    assert error["channel"] < error["token"] / 3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.14159, 1e-20, -1e-38, 1e30])
def test_constant_groups(isa: str, value: float, symmetric: bool) -> None:
    x = torch.full((16, 32), value)
    for axis in ("token", "channel"):
        q = quantize(x, bits=4, axis=axis, group=16, symmetric=symmetric, backend="native")  # type: ignore[arg-type]
        same(q, quantize(x, bits=4, axis=axis, group=16, symmetric=symmetric, backend="reference"))  # type: ignore[arg-type]
        values = dequantize(q, torch.float32)
        assert bool(torch.isfinite(values).all())
        within_half_a_step(x, q, values)
        # One value needs no resolution beyond that of its bfloat16 metadata.
        torch.testing.assert_close(values, x, rtol=2**-7, atol=2.0**-100)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [64, 40])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_poison_stays_in_its_group(isa: str, axis: Axis, size: int, bits: int) -> None:
    x = entries(size, size)
    group = size // 2

    def there_and_back() -> torch.Tensor:
        q = quantize(x, bits=bits, axis=axis, group=group, backend="native")
        return dequantize(q, torch.float32, backend="native")

    clean = there_and_back()
    x[10, 32], x[21, 3] = torch.nan, torch.inf
    touched = torch.zeros(size, size, dtype=torch.bool)
    for row, column in ((10, 32), (21, 3)):
        if axis == "token":
            touched[row, column // group * group :][:group] = True
        else:
            touched[row // group * group :, column][:group] = True
    got = there_and_back()
    assert torch.equal(got[~touched], clean[~touched])
    assert not torch.equal(got[touched], clean[touched])


def test_views_and_preallocated_output(isa: str) -> None:
    table = torch.full((2, 4, 256, 96), torch.nan, dtype=torch.bfloat16)
    table[:, 1:3, 64:192, :64] = entries(2, 2, 128, 64, dtype=torch.bfloat16)
    x = table[:, 1:3, 64:192, :64]
    q = quantize(x, bits=4, axis="channel", group=64, backend="native")
    same(q, quantize(x.contiguous(), bits=4, axis="channel", group=64, backend="reference"))
    # A range of tokens of the quantised table, into a part of a larger buffer.
    part = Quantized(
        codes=q.codes[0][:, 64:],
        scale=q.scale[0][:, 1:],
        zero=q.zero[0][:, 1:],  # type: ignore[index]
        bits=4,
        axis="channel",
        group=64,
    )
    buffer = torch.full((2, 100, 80), 7.0, dtype=torch.bfloat16)
    got = dequantize(part, out=buffer[:, 10:74, 8:72], backend="native")
    assert torch.equal(got, dequantize(q, backend="reference")[0][:, 64:])
    buffer[:, 10:74, 8:72] = 7.0
    assert bool((buffer == 7.0).all())
    slanted = torch.empty(64, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
    assert torch.equal(dequantize(part, out=slanted, backend="native"), got.new_tensor(slanted.tolist()))
    assert torch.equal(slanted, dequantize(part, backend="reference"))


@pytest.mark.parametrize("backend_name", ["native", "reference"])
def test_codes_go_where_the_caller_wants_them(isa: str, backend_name: str) -> None:
    x = entries(2, 128, 64, dtype=torch.bfloat16)
    want = quantize(x, bits=4, axis="channel", group=64, backend="reference")
    pages = torch.full((2, 300, 40), 7, dtype=torch.uint8)
    factors = torch.full((2, 2, 6, 64), 7.0, dtype=torch.bfloat16)
    out = Quantized(
        codes=pages[:, 100:228, 4:36],
        scale=factors[0][:, 1:3],
        zero=factors[1][:, 1:3],
        bits=4,
        axis="channel",
        group=64,
    )
    got = quantize(x, bits=4, axis="channel", group=64, out=out, backend=backend_name)  # type: ignore[arg-type]
    assert got.codes.data_ptr() == out.codes.data_ptr()
    same(Quantized(**{**vars(got), "codes": got.codes.contiguous()}), want)
    out.codes[:], factors[:, :, 1:3] = 7, 7.0
    assert bool((pages == 7).all() & (factors == 7.0).all())
    with pytest.raises(ValueError, match="out does not fit"):
        quantize(x, bits=2, axis="channel", group=64, out=out)


@pytest.mark.parametrize(("axis", "group", "bits"), [("token", 128, 4), ("token", 32, 2), ("channel", 64, 8)])
def test_large_results_are_written_around_the_caches(isa: str, axis: Axis, group: int, bits: int) -> None:
    # The last piece of tokens is shorter than the others.
    x = entries(1, 8, 128, dtype=torch.bfloat16).repeat(1, 13_001 if axis == "token" else 13_000, 1)
    assert x.numel() * 2 > 24 << 20
    want = quantize(x, bits=bits, axis=axis, group=group, backend="reference")
    got = quantize(x, bits=bits, axis=axis, group=group, backend="native")
    same(got, want)
    assert torch.equal(dequantize(got, backend="native"), dequantize(want, backend="reference"))


@given(codes=st.lists(st.integers(0, 255), min_size=8, max_size=8), bits=st.sampled_from(BITS))
def test_packing_is_exact(codes: list[int], bits: int) -> None:
    wanted = torch.tensor(codes, dtype=torch.uint8) & (2**bits - 1)
    packed = pack(wanted, bits)
    assert packed.numel() == bits
    assert torch.equal(unpack(packed, bits), wanted)
    assert int(packed[0]) & (2**bits - 1) == int(wanted[0])


def test_bytes_count_the_metadata() -> None:
    x = entries(2, 128, 64)
    assert quantize(x, bits=4, axis="channel", group=64).bytes == 2 * (128 * 32 + 2 * 64 * 2 * 2)
    assert quantize(x, bits=8, axis="token", group=64, symmetric=True).bytes == 2 * (128 * 64 + 128 * 2)


def test_refusals() -> None:
    x = entries(10, 64)
    with pytest.raises(ValueError, match="10 tokens do not divide into groups of 4; keep the remainder"):
        quantize(x, bits=4, axis="channel", group=4)
    with pytest.raises(ValueError, match="64 channels do not divide"):
        quantize(x, bits=4, axis="token", group=48)
    with pytest.raises(ValueError, match="8, 4 or 2"):
        quantize(x, bits=3, axis="token", group=64)
    with pytest.raises(ValueError, match="whole bytes"):
        quantize(x[:, :3], bits=4, axis="token", group=3)
    with pytest.raises(ValueError, match="'token' or 'channel'"):
        quantize(x, bits=4, axis="row", group=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a GPU"):
        quantize(x, bits=4, axis="token", group=64, backend="triton")
    with pytest.raises(ValueError, match="not float32 or bfloat16"):
        quantize(x.half(), bits=4, axis="token", group=64, backend="native")
    q = quantize(x.half(), bits=4, axis="token", group=64)  # the reference takes it
    with pytest.raises(ValueError, match="the values are"):
        dequantize(q, out=torch.empty(10, 32))
