"""The contract of scorers, budgets and actions, apart and together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contract_harness import (
    DTYPES,
    GROUPS,
    LENGTHS,
    PROFILES,
    ROTARY,
    SAMPLES,
    TOLERANCE,
    data,
    parts,
    same,
    snapshot,
)

from winnow.compression.protocol import Setting
from winnow.kernels.decode import decode
from winnow.store.codecs import ENTRIES
from winnow.types import Budget, Glimpse, Observation, Scores, Segment


def observation(*, stored: int = 63, group: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0):
    d = data(stored=stored, new=min(stored, 8), group=group, dtype=dtype, seed=seed)
    return Observation(
        layer=0,
        layers=2,
        spec=d.spec,
        segment=d.segment,
        tokens=stored,
        queries=d.q,
        query_positions=d.positions,
        rotary=ROTARY,
    )


def scored(part, seen: Observation) -> Scores:
    """What a scorer says of a layer after it saw the attention of the last queries."""
    state = part.state()
    if part.needs.mass != "none":
        part.watch(glimpse(seen), state)
    return part.score(seen, state)


def glimpse(seen: Observation) -> Glimpse:
    """The mass that the observed queries give the layer's entries, by the whole matrix."""
    segment, group = seen.segment, seen.queries.shape[1] // seen.segment.heads
    longest = int(segment.lengths.max())
    mass = torch.zeros(segment.heads, longest)
    for n in range(seen.queries.shape[1]):
        h = n // group
        length = int(segment.lengths[h])
        logits = seen.queries[:, n].float() @ segment.k[h, :length].float().T * seen.spec.scale
        hidden = seen.query_positions[:, None] < segment.positions_of(h)[None]
        mass[h, :length] += logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0).sum(0)
    return Glimpse(
        layer=0,
        prompt=True,
        positions=seen.query_positions,
        lengths=segment.lengths,
        mass=mass,
        group=group,
    )


def setting(part: type, lengths: list[int], layers: int = 1) -> Setting:
    profile = PROFILES.get(part.__name__)
    return Setting(layers=range(layers), of=layers, tokens=max(lengths), profile=profile)


def planned(action, given: Scores, budget: Budget):
    """What an action plans for a layer that holds as many entries as there are scores."""
    lengths = given.lengths.tolist()
    seen = ragged(observation(stored=max(lengths)), lengths)
    return action.plan(seen, given, budget, action.state())


def ragged(seen: Observation, lengths: list[int]) -> Observation:
    """The same layer with fewer entries in some heads: the newest ones, and NaN behind them."""
    segment = seen.segment
    k, v = torch.full_like(segment.k, torch.nan), torch.full_like(segment.v, torch.nan)
    positions = torch.full(k.shape[:2], 12345, dtype=torch.int32)
    for h, n in enumerate(lengths):
        end = int(segment.lengths[h])
        k[h, :n], v[h, :n] = segment.k[h, end - n : end], segment.v[h, end - n : end]
        positions[h, :n] = torch.arange(end - n, end)
    return dataclasses.replace(
        seen,
        segment=dataclasses.replace(
            segment, k=k, v=v, positions=positions, lengths=torch.tensor(lengths, dtype=torch.int32)
        ),
    )


def scores(lengths: list[int], *, protect: int = 0, levels: int = 3, seed: int = 0) -> Scores:
    """Scores with many ties; the first ``protect`` entries are protected and score worst."""
    make = torch.Generator().manual_seed(seed)
    value = torch.randint(0, levels, (len(lengths), max(lengths)), generator=make).float()
    protected = torch.zeros(value.shape, dtype=torch.bool)
    protected[:, :protect] = True
    value[:, :protect] = -1.0
    for h, n in enumerate(lengths):
        value[h, n:] = -torch.inf
    return Scores(value=value, protected=protected, lengths=torch.tensor(lengths, dtype=torch.int32))


# ---------------------------------------------------------------------------------- scorers


@parts("scorer", "one score per entry")
@LENGTHS
@GROUPS
@DTYPES
def test_one_finite_score_per_entry(part, length, group, dtype):
    out = scored(SAMPLES[part].tight, observation(stored=length, group=group, dtype=dtype))
    assert out.value.shape == out.protected.shape == (2, length)
    assert out.value.dtype == torch.float32
    assert out.protected.dtype == torch.bool
    assert out.value.isfinite().all(), "protection is a mask, not an infinite score"


@parts("scorer", "protects what it says")
@pytest.mark.parametrize("length", [1, 2, 63])
def test_protects_as_many_as_it_says(part, length):
    tight = SAMPLES[part].tight
    out = scored(tight, observation(stored=length))
    assert out.protected.sum(1).tolist() == [min(length, tight.protects)] * 2


@parts("scorer", "ragged heads")
def test_heads_of_unequal_length(part):
    tight, whole = SAMPLES[part].tight, observation(stored=63)
    out = scored(tight, ragged(whole, [63, 20]))
    assert out.lengths.tolist() == [63, 20]
    assert out.value[0].isfinite().all()
    assert out.value[1, :20].isfinite().all()
    assert torch.isneginf(out.value[1, 20:]).all()
    assert not out.protected[1, 20:].any()
    torch.testing.assert_close(out.value[0], scored(tight, whole).value[0])


@parts("scorer", "inputs unmutated")
def test_scoring_writes_to_nothing(part):
    seen = observation()
    before = snapshot(seen)
    scored(SAMPLES[part].tight, seen)
    assert same(before, snapshot(seen))


@parts("scorer", "heads do not mix")
def test_kv_heads_do_not_influence_each_other(part):
    seen = observation(group=3)
    alone = scored(SAMPLES[part].tight, seen).value[0]
    seen.segment.k[1] = seen.segment.k[1] * 3 + 1
    torch.testing.assert_close(scored(SAMPLES[part].tight, seen).value[0], alone, atol=0, rtol=0)


@parts("scorer", "state does not leak")
def test_scores_depend_on_this_sequence_only(part):
    tight = SAMPLES[part].tight
    alone = scored(tight, observation(seed=1)).value
    scored(tight, observation(stored=100, seed=2))
    torch.testing.assert_close(scored(tight, observation(seed=1)).value, alone, atol=0, rtol=0)


# ---------------------------------------------------------------------------------- budgets


@parts("budget", "within the lengths")
@pytest.mark.parametrize("lengths", [[1, 1], [5, 63], [1000, 7]])
def test_no_head_is_given_more_than_it_holds(part, lengths):
    sample = SAMPLES[part]
    for rule in sample:
        (budget,) = rule.allocate([scores(lengths)], setting(part, lengths), rule.state())
        assert (budget.entries <= torch.tensor(lengths)).all()
        assert (budget.entries >= 1).all()
    (limit,) = sample.limit.allocate([scores(lengths)], setting(part, lengths), sample.limit.state())
    assert limit.entries.tolist() == lengths, "the limit must keep everything"


@parts("budget", "total preserved")
def test_a_budget_is_met_exactly_in_total(part):
    tight = SAMPLES[part].tight
    lengths = [200, 200]
    budgets = tight.allocate(
        [scores(lengths, seed=i) for i in range(4)], setting(part, lengths, 4), tight.state()
    )
    assert len(budgets) == 4
    total = sum(int(b.entries.sum()) for b in budgets)
    assert total == 4 * 2 * (200 if tight.least is None else tight.keep)


@parts("budget", "inputs unmutated")
def test_allocating_writes_to_nothing(part):
    given = [scores([40, 50])]
    before, tight = snapshot(given), SAMPLES[part].tight
    (budget,) = tight.allocate(given, setting(part, [40, 50]), tight.state())
    budget.entries.add_(1)
    assert same(before, snapshot(given))


# ---------------------------------------------------------------------------------- actions


def budget_of(*entries: int) -> Budget:
    return Budget(entries=torch.tensor(entries, dtype=torch.int32))


@parts("action", "budget met exactly")
@pytest.mark.parametrize("lengths", [[63, 63], [1000, 1000], [63, 12], [300, 7]])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_budget_is_met_exactly_under_ties(part, lengths, levels):
    given = scores(lengths, protect=4, levels=levels)
    plan = planned(SAMPLES[part].tight, given, budget_of(11, 11))
    assert plan.keep is not None
    for n, keep in zip(lengths, plan.keep, strict=True):
        assert keep.dtype == torch.int64
        assert keep.numel() == min(n, 11)
        assert (keep.diff() > 0).all(), "ascending and unique"
        assert int(keep[0]) >= 0
        assert int(keep[-1]) < n


@parts("action", "protected survive ties")
@pytest.mark.parametrize("levels", [1, 3])
def test_protected_entries_survive_ties_and_bad_scores(part, levels):
    given = scores([63, 63], protect=10, levels=levels)
    for keep in planned(SAMPLES[part].tight, given, budget_of(11, 11)).keep:
        assert set(range(10)) <= set(keep.tolist())


@parts("action", "best stay")
def test_the_best_scores_stay(part):
    given = scores([63, 63], levels=1000)
    for h, keep in enumerate(planned(SAMPLES[part].tight, given, budget_of(11, 11)).keep):
        gone = torch.ones(63, dtype=torch.bool)
        gone[keep] = False
        assert given.value[h, keep].min() >= given.value[h, gone].max()


@parts("action", "everything fits")
def test_a_budget_for_everything_drops_nothing(part):
    plan = planned(SAMPLES[part].limit, scores([63, 12]), budget_of(63, 12))
    assert plan.keep is None
    assert plan.demote == ()


@parts("action", "deterministic")
def test_same_scores_same_plan(part):
    plans = [planned(SAMPLES[part].tight, scores([300, 300]), budget_of(50, 60)) for _ in range(3)]
    for plan in plans[1:]:
        assert all(torch.equal(a, b) for a, b in zip(plan.keep, plans[0].keep, strict=True))


@parts("action", "refuses nonsense")
def test_nan_and_overfull_protection_are_refused(part):
    given = scores([63, 63])
    given.value[1, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        planned(SAMPLES[part].tight, given, budget_of(11, 11))
    with pytest.raises(ValueError, match="protect"):
        planned(SAMPLES[part].tight, scores([63, 63], protect=12), budget_of(11, 11))


@parts("action", "inputs unmutated")
def test_planning_writes_to_nothing(part):
    given, budget = scores([63, 40], protect=2), budget_of(11, 11)
    before = snapshot((given, budget))
    planned(SAMPLES[part].tight, given, budget)
    assert same(before, snapshot((given, budget)))


@parts("action", "whole pages")
def test_demotion_takes_whole_pages_of_what_stays(part):
    plan = planned(SAMPLES[part].tight, scores([400, 300]), budget_of(400, 200))
    for demotion in plan.demote:
        assert demotion.codec is not None or demotion.tier is not None
        listed = demotion.entries or (torch.arange(demotion.oldest),) * 2
        for h, entries in enumerate(listed):
            assert entries.numel() % ENTRIES == 0
            stay = torch.arange((400, 300)[h]) if plan.keep is None else plan.keep[h]
            assert entries.numel() <= stay.numel()
            assert demotion.entries is None or torch.isin(entries, stay).all()


# ---------------------------------------------------------------------------------- together


def gathered(segment: Segment, keep: tuple[torch.Tensor, ...], *, shuffle: bool = False) -> Segment:
    longest = max(one.numel() for one in keep)
    k = torch.full((2, longest, segment.k.shape[2]), torch.nan, dtype=segment.k.dtype)
    v, positions = k.clone(), torch.zeros(2, longest, dtype=torch.int32)
    for h, one in enumerate(keep):
        listed = one[torch.randperm(one.numel())] if shuffle else one
        n = one.numel()
        k[h, :n], v[h, :n], positions[h, :n] = segment.k[h, listed], segment.v[h, listed], listed.int()
    lengths = torch.tensor([one.numel() for one in keep], dtype=torch.int32)
    return dataclasses.replace(segment, k=k, v=v, positions=positions, lengths=lengths)


@parts("scorer", "order of entries")
@GROUPS
@DTYPES
def test_attention_over_what_stays_does_not_depend_on_its_order(part, group, dtype):
    seen = observation(stored=63, group=group, dtype=dtype)
    sample = SAMPLES[part].tight
    from winnow.compression.actions.drop import Drop

    keep = planned(Drop(), scored(sample, seen), budget_of(20, 11)).keep
    q, spec = seen.queries[-1], seen.spec
    ordered = decode(q, gathered(seen.segment, keep), spec=spec, position=62)
    shuffled = decode(q, gathered(seen.segment, keep, shuffle=True), spec=spec, position=62)
    mask = torch.zeros(2, 63, dtype=torch.bool)
    for h, one in enumerate(keep):
        mask[h, one] = True
    k, v = (t[:, :63].float().repeat_interleave(group, 0) for t in (seen.segment.k, seen.segment.v))
    logits = torch.einsum("nd,nsd->ns", q.float(), k) * spec.scale
    probs = logits.masked_fill(~mask.repeat_interleave(group, 0), -torch.inf).softmax(-1)
    expected = torch.einsum("ns,nsd->nd", probs, v)
    torch.testing.assert_close(ordered.out[0].float(), expected, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(shuffled.out, ordered.out, atol=TOLERANCE[dtype], rtol=0)
