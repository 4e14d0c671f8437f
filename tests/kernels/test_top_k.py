"""Native top-k selection against the reference and torch.topk, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from winnow.kernels import backend
from winnow.kernels.top_k import top_k

ISAS = backend.isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")


def check(
    scores: torch.Tensor, lengths: torch.Tensor, k: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    got = top_k(scores, lengths, k, backend="native")
    want = top_k(scores, lengths, k, backend="reference")
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])
    return got


def full(rows: int, length: int) -> torch.Tensor:
    return torch.full((rows,), length, dtype=torch.int32)


def make(kind: str, rows: int, width: int, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=gen)
    match kind:
        case "normal":
            return x
        case "few values":  # ties everywhere, both zeros among them
            return (x * 2).round() * 0.5 * torch.where(torch.rand(rows, width, generator=gen) < 0.5, -1, 1)
        case "constant":
            return torch.ones_like(x)
        case "outliers":
            return torch.exp(8 * x)
        case "ascending":
            return x.sort(dim=1).values
        case "periodic":  # repeats with any stride that a sample might use
            return torch.where(torch.arange(width) % 64 < 3, x + 10, x)
        case "clustered":  # neighbours are alike, so that a line of the cache says little about a row
            return x[:, ::40].repeat_interleave(40, dim=1)[:, :width] + x / 1000
        case "late":  # the largest all lie at the end, where a sample may not look
            x[:, -width // 50 :] += 100
            return x
        case "poisoned":
            x[torch.rand(rows, width, generator=gen) < 0.3] = -torch.inf
            x[torch.rand(rows, width, generator=gen) < 0.3] = torch.nan
            x[:, ::101] = torch.inf
            return x
    raise AssertionError(kind)


KINDS = [
    "normal",
    "few values",
    "constant",
    "outliers",
    "ascending",
    "periodic",
    "clustered",
    "late",
    "poisoned",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 700, 11_999])
def test_long_rows(isa: str, kind: str, k: int) -> None:
    scores = make(kind, 3, 12_000)
    check(scores, torch.tensor([12_000, 11_997, 9_001], dtype=torch.int32), k)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_row(isa: str, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 400), label="width")
    rows = data.draw(st.integers(1, 3), label="rows")
    scores = make(data.draw(st.sampled_from(KINDS), label="kind"), rows, width, data.draw(st.integers(0, 99)))
    ints = st.lists(st.integers(0, width), min_size=rows, max_size=rows)
    lengths, k = data.draw(ints, label="lengths"), data.draw(ints, label="k")
    poisoned = scores.clone()
    for r, n in enumerate(lengths):
        poisoned[r, n:] = 1e30  # nothing behind a length is looked at
    check(poisoned, torch.tensor(lengths, dtype=torch.int32), torch.tensor(k, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["normal", "few values", "outliers"])
def test_same_scores_as_torch(isa: str, kind: str) -> None:
    scores = make(kind, 4, 20_000, seed=1)
    indices, counts = check(scores, full(4, 20_000), 1000)
    assert counts.tolist() == [1000] * 4
    assert (indices.diff() > 0).all()
    chosen = scores.gather(1, indices.long()).sort(dim=1, descending=True).values
    assert torch.equal(chosen, scores.topk(1000).values)


def test_ties_take_the_most_recent(isa: str) -> None:
    scores = torch.tensor([[1.0, 5.0, 1.0, 1.0, 0.0, 1.0]])
    indices, _ = check(scores, full(1, 6), 3)
    assert indices.tolist() == [[1, 3, 5]]


def test_strided_rows_and_two_threads(isa: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    check(make("normal", 8, 40_000)[:, 1:39_001], full(8, 39_000), 777)
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_all_lengths_in_turn(isa: str, threads: int) -> None:
    """While one row is sorted out the next one is fetched, be it empty, short, sampled or not wanted."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    lengths = torch.tensor(
        [0, 70_000, 5, 9_000, 0, 0, 33_001, 8_192, 8_191, 0, 64, 40_000], dtype=torch.int32
    )
    k = torch.tensor([3, 700, 5, 0, 1, 0, 900, 8_192, 50, 2, 1, 40], dtype=torch.int32)
    check(make("normal", 12, 70_001)[:, 1:], lengths, k)
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("lengths", "k", "remedy"),
    [
        (torch.tensor([11], dtype=torch.int32), 3, "outside its row"),
        (torch.tensor([10]), 3, "int32"),
        (torch.tensor([10], dtype=torch.int32), -1, "0 or more"),
        (torch.tensor([10], dtype=torch.int32), torch.tensor([-2], dtype=torch.int32), "0 or more"),
    ],
)
def test_refuses_what_does_not_fit(lengths: torch.Tensor, k: int | torch.Tensor, remedy: str) -> None:
    for name in ("native", "reference"):
        with pytest.raises(ValueError, match=remedy):
            top_k(torch.zeros(1, 10), lengths, k, backend=name)
