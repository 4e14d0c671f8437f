"""Native key scan against the reference, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from winnow.kernels import backend
from winnow.kernels.key_scan import Bits, KeyCodes, Reduction, key_scan, quantize_keys
from winnow.kernels.key_scan.reference import decoded

ISAS = backend.isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")


def poisoned(heads: int, capacity: int, dim: int, bits: Bits) -> KeyCodes:
    keys = KeyCodes.empty(heads, capacity, dim, bits)
    keys.codes.fill_(0xA5)
    keys.scales.fill_(torch.nan)
    return keys


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def fill(k: torch.Tensor, lengths: torch.Tensor, bits: Bits, name: backend.Backend) -> KeyCodes:
    keys = poisoned(k.shape[0], k.shape[1], k.shape[2], bits)
    quantize_keys(k, torch.zeros_like(lengths), lengths, keys, backend=name)
    return keys


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_reference(isa: str, data: st.DataObject) -> None:
    lengths_list = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=3), label="lengths")
    group = data.draw(st.integers(1, 9), label="group")
    dim = data.draw(st.sampled_from([16, 48, 64, 128, 256]), label="dim")
    bits = data.draw(st.sampled_from([4, 8]), label="bits")
    reduce: Reduction = data.draw(st.sampled_from(["max", "sum", "none"]), label="reduce")
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]), label="dtype")
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    heads, lengths = len(lengths_list), int32(*lengths_list)
    k = torch.randn(heads, max(lengths_list) + 5, dim, generator=gen).to(dtype)
    k[:, ::13] = 0  # a key without a largest value
    for h, n in enumerate(lengths_list):
        k[h, n:] = torch.nan
    q = torch.randn(heads * group, dim, generator=gen).to(dtype)

    native, reference = fill(k, lengths, bits, "native"), fill(k, lengths, bits, "reference")
    assert torch.equal(native.codes, reference.codes)
    torch.testing.assert_close(native.scales, reference.scales, rtol=0, atol=0, equal_nan=True)

    width = max(lengths_list) + data.draw(st.integers(0, 20), label="more")
    got = key_scan(q, native, lengths, reduce=reduce, width=width, backend="native")
    want = key_scan(q, native, lengths, reduce=reduce, width=width, backend="reference")
    # Products of codes are exact; only the order of a sum over the group may differ.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5 if reduce == "sum" else 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_as_near_as_their_step(isa: str, bits: Bits) -> None:
    k = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(1))
    keys = fill(k, int32(100, 100), bits, "native")
    back = decoded(keys)[:, :100] * keys.scales[:, :100, None]
    step = k.abs().amax(-1, keepdim=True) / (127 if bits == 8 else 7)
    assert ((back - k).abs() <= step * 0.5001).all()


@pytest.mark.parametrize(("bits", "least"), [(4, 0.97), (8, 0.999)])
def test_scores_follow_the_exact_products(isa: str, bits: Bits, least: float) -> None:
    gen = torch.Generator().manual_seed(2)
    k, q = torch.randn(1, 5000, 128, generator=gen), torch.randn(1, 128, generator=gen)
    scores = key_scan(q, fill(k, int32(5000), bits, "native"), int32(5000), backend="native")
    assert torch.corrcoef(torch.stack((scores[0], k[0] @ q[0])))[0, 1] > least


@pytest.mark.parametrize("bits", [4, 8])
def test_appending_equals_quantising_at_once(isa: str, bits: Bits) -> None:
    k = torch.randn(2, 90, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = fill(k, int32(85, 90), bits, "native")
    parts = poisoned(2, 20, 32, bits)
    at = int32(0, 0)
    for end in (int32(1, 0), int32(17, 20), int32(17, 48), int32(85, 90)):
        parts = parts.grown(int(end.max()))
        quantize_keys(k, at, end, parts, backend="native")
        at = end
    for h, n in enumerate((85, 90)):
        assert torch.equal(parts.scales[h, :n], whole.scales[h, :n])
        assert torch.equal(decoded(parts)[h, :n], decoded(whole)[h, :n])


def test_split_over_threads(isa: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    gen = torch.Generator().manual_seed(4)
    k, q = torch.randn(2, 20_000, 64, generator=gen), torch.randn(8, 64, generator=gen)
    lengths = int32(20_000, 9_001)
    native, reference = fill(k, lengths, 4, "native"), fill(k, lengths, 4, "reference")
    assert torch.equal(native.codes, reference.codes)
    got = key_scan(q, native, lengths, backend="native")
    torch.testing.assert_close(got, key_scan(q, native, lengths, backend="reference"), rtol=1e-6, atol=0)
    torch.set_num_threads(before)


def test_refuses_what_does_not_fit() -> None:
    k, keys = torch.randn(2, 40, 32), KeyCodes.empty(2, 32, 32, 8)
    for name in ("native", "reference"):
        with pytest.raises(ValueError, match="outside the reserve"):
            quantize_keys(k, int32(0, 0), int32(33, 3), keys, backend=name)
        with pytest.raises(ValueError, match="outside the reserve"):
            key_scan(torch.randn(4, 32), keys, int32(33, 3), backend=name)
        with pytest.raises(ValueError, match="do not fit"):
            key_scan(torch.randn(3, 32), keys, int32(3, 3), backend=name)
    with pytest.raises(ValueError, match="4 or 8 bits"):
        KeyCodes.empty(1, 16, 32, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 16"):
        KeyCodes.empty(1, 16, 24, 8)
