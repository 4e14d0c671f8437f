"""Which entries stay: all heads at once against one head at a time, by sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.compression.actions.drop import kept, kept_of_head
from winnow.compression.tracks import Tracks
from winnow.types import Budget, Scores


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    values=st.sampled_from([2, 5, 1000]),
    missing=st.booleans(),
    seed=st.integers(0, 999),
)
def test_all_heads_at_once_equal_one_at_a_time(
    lengths: list[int], values: int, missing: bool, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    H, S = len(lengths), max(lengths)
    value = torch.randint(values, (H, S), generator=gen).float()  # many ties
    if missing:
        value[torch.rand(H, S, generator=gen) < 0.5] = -torch.inf
    protected = torch.rand(H, S, generator=gen) < 0.2
    for h, n in enumerate(lengths):
        value[h, n:], protected[h, n:] = -torch.inf, False
    guarded = protected.sum(1)
    rooms = guarded + (torch.rand(H, generator=gen) * (torch.tensor(lengths) - guarded + 1)).int()
    scores = Scores(value=value, protected=protected, lengths=torch.tensor(lengths, dtype=torch.int32))
    before = value.clone()
    got = kept(scores, Budget(entries=rooms.int()))
    torch.testing.assert_close(value, before, rtol=0, atol=0)
    if all(n <= room for n, room in zip(lengths, rooms.tolist(), strict=True)):
        assert got is None
        return
    assert got is not None
    for h, (n, room) in enumerate(zip(lengths, rooms.tolist(), strict=True)):
        want = kept_of_head(value[h, :n], protected[h, :n], room)
        assert got[h].dtype == torch.int64
        assert got[h].tolist() == want.tolist()
        assert len(want) == room


def test_one_head_by_hand() -> None:
    value = torch.tensor([3.0, 1.0, 2.0, 2.0, -torch.inf, 2.0])
    protected = torch.tensor([False, True, False, False, False, False])
    assert kept_of_head(value, protected, 1).tolist() == [1]
    assert kept_of_head(value, protected, 4).tolist() == [0, 1, 3, 5]  # of equal scores the later
    assert kept_of_head(value, protected, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_new_entries_get_what_they_are_told() -> None:
    tracks = Tracks(torch.int32, -1)
    assert tracks.of(0, torch.tensor([2, 3], dtype=torch.int32), new=7).tolist() == [[7, 7, -1], [7, 7, 7]]
    tracks.keep(0, [torch.tensor([1]), torch.tensor([0, 2])])
    table = tracks.of(0, torch.tensor([2, 3], dtype=torch.int32), new=9)
    assert table.tolist() == [[7, 9, -1], [7, 7, 9]]
    assert tracks.of(0, torch.tensor([4, 4], dtype=torch.int32)).tolist() == [[7, 9, -1, -1], [7, 7, 9, -1]]
    with pytest.raises(AssertionError, match="without the tracks"):
        tracks.of(0, torch.tensor([1, 4], dtype=torch.int32), new=0)
