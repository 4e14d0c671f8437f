"""AdaKV against the published allocation, head by head in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.one_layer import drive, streams
from winnow.compression.budgets.adaptive import Adaptive
from winnow.compression.budgets.apportion import apportion
from winnow.compression.protocol import Setting
from winnow.methods import load
from winnow.types import Scores

SETTING = Setting(layers=[0], of=1, tokens=100)


def scores(value, window=0):
    value = torch.tensor(value)
    protected = torch.zeros_like(value, dtype=torch.bool)
    if window:
        protected[:, -window:] = True
    lengths = torch.full((value.shape[0],), value.shape[1], dtype=torch.int32)
    return Scores(value=value, protected=protected, lengths=lengths)


def allocated(rule, given):
    (budget,) = rule.allocate([given], SETTING, None)
    return budget.entries.tolist()


def test_counts_of_the_best_scores_mixed_with_the_floor():
    # Of the 8 best scores head 0 holds 6, head 1 two; alpha = 2 / 4.
    given = scores([[9.0, 8, 7, 6, 5, 4, 0, 0], [9.5, 8.5, 1, 1, 1, 1, 1, 1]])
    assert allocated(Adaptive(keep=4, floor=2), given) == [6 // 2 + 2, 2 // 2 + 2]
    assert allocated(Adaptive(keep=4, floor=0), given) == [6, 2]


def test_a_floor_of_everything_is_uniform():
    given = scores(torch.rand(4, 50, generator=torch.Generator().manual_seed(0)).tolist(), window=3)
    assert allocated(Adaptive(keep=13, floor=13), given) == [13] * 4


def test_a_head_with_equal_scores_gets_its_floor():
    strong = torch.rand(60, generator=torch.Generator().manual_seed(1)) + 5
    given = scores([strong.tolist(), [0.0] * 60])
    entries = allocated(Adaptive(keep=20, floor=6), given)
    assert entries[1] >= 6
    assert sum(entries) == 40


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=8),
    st.integers(0, 500),
    st.data(),
)
@settings(deadline=None)
def test_shares_add_up_and_respect_the_caps(weights, total, data):
    caps = [data.draw(st.integers(0, 100)) for _ in weights]
    shares = apportion(weights, total, caps)
    assert sum(shares) == min(total, sum(caps))
    assert all(0 <= share <= cap for share, cap in zip(shares, caps, strict=True))


def test_shares_are_within_one_of_proportional():
    assert apportion([1, 1, 1], 10, [100] * 3) == [4, 3, 3]
    assert apportion([3, 1], 8, [100, 100]) == [6, 2]
    assert apportion([3, 1], 8, [4, 100]) == [4, 4]
    assert apportion([0, 0], 4, [10, 10]) == [2, 2]


@pytest.mark.parametrize("floor", [0, 4, 22])
def test_heads_hold_what_they_were_given(floor):
    q, k, v = streams(120, heads=3, seed=2)
    k[:, 1] *= 3  # a head whose attention is sharp
    recipe = load("adakv", keep=30, window=8, floor=floor)
    (step, *_) = drive(recipe, q, k, v, prompt=110)
    held = [len(one) for one in step.positions]
    assert sum(held) == 90
    assert all(set(range(102, 110)) <= set(one) for one in step.positions)
    if floor == 22:
        uniform = drive(load("snapkv", keep=30, window=8, kernel=7, pooling="max"), q, k, v, prompt=110)[0]
        assert step.positions == uniform.positions
