"""The native recurrence against the reference, on every instruction set that this machine has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.many_queries import ISAS, forced
from winnow.kernels.recurrence import recur

pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")


def tables(H: int, S: int, seed: int = 0, share: float = 0.1):
    """Mass of which about ``share`` reaches 0.5, and numbers of earlier steps, as parts of wider tables."""
    g = torch.Generator().manual_seed(seed)
    mass = torch.rand(H, S, generator=g)
    mass = torch.where(torch.rand(H, S, generator=g) < share, 0.5 + mass / 2, mass / 2)
    mass[:, ::5] = 0.5  # at the limit itself
    active = torch.randint(-1, 90, (H, S + 9), generator=g).int()
    pause = torch.randint(0, 60, (H, S + 4), generator=g).int()
    return mass, active, pause


@settings(max_examples=60, deadline=None)
@given(
    H=st.integers(1, 5),
    S=st.integers(0, 300),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
def test_equals_reference(H: int, S: int, seed: int, share: float) -> None:
    mass, active, pause = tables(H, S, seed, share)
    wanted = [active.clone(), pause.clone()]
    recur(mass, wanted[0][:, :S], wanted[1][:, :S], step=100, least=0.5, backend="reference")
    for name in ISAS:
        got = [active.clone(), pause.clone()]
        with forced(name):
            recur(mass, got[0][:, :S], got[1][:, :S], step=100, least=0.5, backend="native")
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_one_entry_by_hand() -> None:
    for backend in ("native", "reference"):
        mass = torch.tensor([[0.4, 0.5, 0.6]])
        active, pause = torch.tensor([[3, 3, 9]]).int(), torch.tensor([[1, 1, 5]]).int()
        recur(mass, active, pause, step=10, least=0.5, backend=backend)
        assert active.tolist() == [[3, 10, 10]]
        assert pause.tolist() == [[1, 7, 5]]


def test_split_over_threads() -> None:
    mass, active, pause = tables(5, 20_000)
    wanted = [active.clone(), pause.clone()]
    recur(mass, wanted[0][:, :20_000], wanted[1][:, :20_000], step=100, least=0.5, backend="reference")
    recur(mass, active[:, :20_000], pause[:, :20_000], step=100, least=0.5, backend="native")
    assert torch.equal(active, wanted[0])
    assert torch.equal(pause, wanted[1])


def test_what_does_not_fit_is_refused() -> None:
    mass, active, pause = tables(2, 8)
    active, pause = active[:, :8], pause[:, :8]
    for call, message in (
        ((mass.double(), active, pause), "mass"),
        ((mass, active.long(), pause), "active"),
        ((mass, active, pause[:, :7]), "pause"),
        ((mass, active, pause.T.contiguous().T), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            recur(*call, step=1, least=0.5)
    with pytest.raises(ValueError, match="Triton"):
        recur(mass, active, pause, step=1, least=0.5, backend="triton")
