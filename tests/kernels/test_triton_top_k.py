"""The Triton top-k, interpreted, against the reference: sets, so exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_process import interpreted, needs_triton
from winnow.kernels.top_k import top_k

pytestmark = needs_triton


def check(scores: Tensor, lengths: list[int], k: Tensor | int) -> None:
    lengths_R = torch.tensor(lengths, dtype=torch.int32)
    got = interpreted("winnow.kernels.top_k:top_k", scores, lengths_R, k, backend="triton")
    want = top_k(scores, lengths_R, k, backend="reference")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def scores(S: int, kind: str) -> Tensor:
    made = torch.randn(4, S + 3, generator=torch.Generator().manual_seed(S))[:, :S]
    if kind == "ties":  # the larger index wins; -0 ties with 0
        made = made.round()
        made[:, ::2] = torch.where(made[:, ::2] == 0, -0.0, made[:, ::2])
    if kind == "special":
        made[:, ::3], made[:, 1::7], made[:, 2::9] = -torch.inf, torch.nan, torch.inf
    if kind == "close":  # all alike but for the last bits
        made = (1.0 + torch.randint(0, 300, (4, S)).float() * 2**-23) * 3.0
    return made


@pytest.mark.parametrize("kind", ["plain", "ties", "special", "close"])
@pytest.mark.parametrize("S", [1, 63, 200])
def test_selection(S: int, kind: str) -> None:
    k = torch.tensor([min(S, 17), S, 5, 0], dtype=torch.int32)
    check(scores(S, kind), [S, max(S - 5, 0), 0, S], k)


def test_one_k_for_all_rows() -> None:
    check(scores(130, "plain"), [130, 100, 64, 1], 40)
    check(scores(130, "plain"), [130, 100, 64, 1], 0)
