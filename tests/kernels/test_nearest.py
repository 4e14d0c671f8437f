"""The native similarity search against the reference, on every instruction set that this machine has."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.many_queries import BF16, F32, ISAS, on_every_isa, one_thread
from tests.kernels.tolerances import COSINE
from winnow.kernels.nearest import nearest, reference

pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")


def make(rows: int, hosts: int, *, D: int = 64, dtype: torch.dtype = BF16, seed: int = 0):
    """A matrix of clustered rows of very different norms, and which of them ask and answer."""
    g = torch.Generator().manual_seed(seed)
    C = rows + hosts + 3
    centres = torch.randn(7, D, generator=g)
    x = centres[torch.randint(0, 7, (C,), generator=g)] + 0.3 * torch.randn(C, D, generator=g)
    x *= torch.rand(C, 1, generator=g) * 10 + 0.01
    order = torch.randperm(C, generator=g)
    return x.to(dtype), order[:rows].sort().values, order[rows : rows + hosts].sort().values


def compare(x: Tensor, rows: Tensor, hosts: Tensor) -> None:
    rtol, atol = COSINE
    with one_thread():
        want, _ = reference.nearest(x, rows, hosts)
        unit = torch.nn.functional.normalize(x.float(), dim=-1)
    for name, (cosine, host) in on_every_isa(lambda: nearest(x, rows, hosts, backend="native"), x):
        torch.testing.assert_close(cosine, want, rtol=rtol, atol=atol, msg=partial("on {}: {}".format, name))
        # Which host it is may differ from the reference's only where the two are as similar.
        theirs = (unit[rows] * unit[hosts[host]]).sum(1)
        torch.testing.assert_close(theirs, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("D", [16, 32, 64, 80, 128, 256])
def test_sizes_of_rows(dtype: torch.dtype, D: int) -> None:
    compare(*make(131, 70, D=D, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 48, 49])
@pytest.mark.parametrize("hosts", [1, 15, 16, 17, 63, 64, 65])
def test_parts_of_tiles(dtype: torch.dtype, rows: int, hosts: int) -> None:
    compare(*make(rows, hosts, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    hosts=st.integers(1, 300),
    D=st.sampled_from([16, 48, 64]),
    dtype=st.sampled_from([F32, BF16]),
    seed=st.integers(0, 99),
)
def test_equals_reference(rows: int, hosts: int, D: int, dtype: torch.dtype, seed: int) -> None:
    compare(*make(rows, hosts, D=D, dtype=dtype, seed=seed))


def test_split_over_threads() -> None:
    x, rows, hosts = make(3000, 500)
    compare(x, rows, hosts)
    shared = nearest(x, rows, hosts, backend="native")
    with one_thread():
        alone = nearest(x, rows, hosts, backend="native")
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_first_of_equal_hosts_is_taken(dtype: torch.dtype) -> None:
    x, rows, hosts = make(20, 90, dtype=dtype)
    one = x[hosts[0]].clone()
    x[hosts] = one
    for _, (_, host) in on_every_isa(lambda: nearest(x, rows, hosts, backend="native"), x):
        assert not host.any()
    x[hosts[40:]] = -one
    for _, (cosine, host) in on_every_isa(lambda: nearest(x, rows, hosts, backend="native"), x):
        assert set(host.tolist()) <= {0, 40}
        assert (cosine >= 0).all()


def test_opposite_hosts_are_not_beaten_by_padding() -> None:
    x = torch.ones(5, 16)
    x[1:] = -1
    rows, hosts = torch.tensor([0]), torch.tensor([1, 2, 3])
    for _, (cosine, host) in on_every_isa(lambda: nearest(x, rows, hosts, backend="native"), x):
        torch.testing.assert_close(cosine, torch.tensor([-1.0]))
        assert host.tolist() == [0]


def test_rows_of_zeros_are_similar_to_nothing() -> None:
    x, rows, hosts = make(9, 20)
    x[rows[4]] = 0
    x[hosts[3]] = 0
    compare(x, rows, hosts)
    for _, (cosine, _) in on_every_isa(lambda: nearest(x, rows, hosts, backend="native"), x):
        assert cosine[4] == 0


def test_rows_of_a_wider_matrix() -> None:
    x, rows, hosts = make(60, 33)
    wide = torch.full((x.shape[0], 3 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    compare(wide[:, : x.shape[1]], rows, hosts)


def test_nobody_asks() -> None:
    x, _, hosts = make(5, 8)
    cosine, host = nearest(x, torch.empty(0, dtype=torch.long), hosts, backend="native")
    assert cosine.shape == host.shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    x, rows, hosts = make(5, 8)
    for call, message in (
        ((x, rows, hosts[:0]), "no host"),
        ((x, rows + 100, hosts), "outside"),
        ((x, rows, hosts - 100), "outside"),
        ((x, rows.float(), hosts), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest(*call)
    for bad, message in ((x.half(), "float16"), (x[:, :24], "multiples of 16")):
        with pytest.raises(ValueError, match=message):
            nearest(bad, rows, hosts, backend="native")
        cosine, _ = nearest(bad, rows, hosts)  # auto takes the reference
        torch.testing.assert_close(cosine, reference.nearest(bad, rows, hosts)[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="Triton"):
        nearest(x, rows, hosts, backend="triton")
