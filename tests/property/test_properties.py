"""Properties that hold for any input: budgets, lists, recipes, stripes."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.compression.actions.demote import Demote
from winnow.compression.actions.drop import Drop, kept
from winnow.compression.budgets.everything import Everything
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.generation.a_shape import AShape
from winnow.generation.anchor import Anchor
from winnow.generation.protocol import PrefillLayer
from winnow.kernels.merge import merge
from winnow.kernels.prefill import prefill
from winnow.loading.lists import NOWHERE, choose, compact, locate, positions_of
from winnow.loading.sketch import Sketch
from winnow.loading.tidal import Tidal
from winnow.recipe import Recipe
from winnow.retrieval.radix import Radix
from winnow.store.codecs import ENTRIES
from winnow.types import AttentionSpec, Budget, Scores, Segment

counts = st.integers(1, 10_000)


# ---------------------------------------------------------------------------------- recipes

generations = (
    st.none()
    | st.builds(AShape, init=st.integers(0, 9999), local=counts)
    | st.builds(
        Anchor,
        theta=st.floats(allow_nan=False),
        block=st.integers(1, 256),
        step=st.integers(1, 32),
        init=st.integers(0, 512),
    )
)
compressions = (
    st.none()
    | st.builds(
        lambda window, more, pool, pooling, act, turns: Compress(
            score=WindowAttention(window=window, pool=2 * pool + 1, pooling=pooling),
            budget=Uniform(keep=window + more),
            act=act,
            turns=turns,
        ),
        st.integers(1, 128),
        counts,
        st.integers(0, 5),
        st.sampled_from(["avg", "max"]),
        st.just(Drop()) | st.builds(Demote, codec=st.just("raw"), recent=st.integers(0, 999)),
        st.sampled_from(["first", "every"]),
    )
    | st.builds(
        Compress,
        score=st.builds(Recency, sinks=st.integers(0, 9)),
        budget=st.just(Everything()),
        act=st.builds(Demote, codec=st.none(), tier=st.sampled_from(["device", "host", "disk"])),
    )
)
loadings = (
    st.none()
    | st.builds(
        Tidal,
        keep=counts,
        dense_layers=st.integers(0, 3),
        select_layers=st.none() | st.sets(st.integers(3, 60), min_size=1).map(sorted).map(tuple),
    )
    | st.builds(
        lambda room, bits, every, recent, sinks: Sketch(
            keep=room + recent + sinks, bits=bits, every=every, recent=recent, sinks=sinks
        ),
        counts,
        st.sampled_from([4, 8]),
        st.integers(1, 8),
        st.integers(1, 99),
        st.integers(0, 9),
    )
)
retrievals = st.none() | st.builds(Radix, page=counts, capacity_bytes=st.integers(0, 1 << 40))
names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), max_size=30)
recipes = st.builds(
    Recipe,
    name=names,
    generation=generations,
    compression=compressions,
    retrieval=retrievals,
    loading=loadings,
)


@given(recipes)
def test_any_recipe_survives_yaml(recipe):
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    assert again.generation_fingerprint() == recipe.generation_fingerprint()


@given(recipes, recipes)
def test_equal_fingerprints_mean_equal_recipes(a, b):
    same = [getattr(a, s) == getattr(b, s) for s in ("generation", "compression", "retrieval", "loading")]
    assert (a.fingerprint() == b.fingerprint()) == all(same)


# ---------------------------------------------------------------------------------- budgets


@st.composite
def layers(draw):
    """Scores with ties of ragged heads, a mask of protected entries, and a budget that has room for them."""
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    longest = max(lengths)
    value = torch.full((len(lengths), longest), -torch.inf)
    protected = torch.zeros(len(lengths), longest, dtype=torch.bool)
    room = []
    for h, n in enumerate(lengths):
        levels = st.integers(-2, 2).map(float) | st.floats(-5, 5, width=32)
        value[h, :n] = torch.tensor(draw(st.lists(levels, min_size=n, max_size=n)))
        chosen = draw(st.sets(st.integers(0, n - 1), max_size=min(n, 20)))
        protected[h, sorted(chosen)] = True
        room.append(draw(st.integers(max(1, len(chosen)), n)))
    scores = Scores(value=value, protected=protected, lengths=torch.tensor(lengths, dtype=torch.int32))
    return scores, Budget(entries=torch.tensor(room, dtype=torch.int32))


@given(layers())
@settings(deadline=None)
def test_what_stays_meets_the_budget_and_is_best(layer):
    scores, budget = layer
    keep = kept(scores, budget)
    if keep is None:
        assert torch.equal(budget.entries, scores.lengths)
        return
    for h, one in enumerate(keep):
        n, listed = int(scores.lengths[h]), one.tolist()
        assert len(listed) == int(budget.entries[h])
        assert listed == sorted(set(listed))
        guarded = set(scores.protected[h, :n].nonzero().flatten().tolist())
        assert guarded <= set(listed)
        open_ = [j for j in range(n) if j not in guarded]
        best = sorted(open_, key=lambda j: (float(scores.value[h, j]), j), reverse=True)
        assert set(listed) - guarded == set(best[: len(listed) - len(guarded)])


@given(layers(), st.integers(0, 200))
@settings(deadline=None)
def test_demotion_leaves_the_recent_entries_alone(layer, recent):
    scores, budget = layer
    # The action looks at scores and budget alone.
    plan = Demote(codec="raw", recent=recent).plan(None, scores, budget, None)
    shortest = min(budget.entries.tolist())
    demoted = sum(one.oldest for one in plan.demote)
    assert demoted % ENTRIES == 0
    assert demoted <= max(0, shortest - recent) < demoted + ENTRIES


# ---------------------------------------------------------------------------------- lists


@given(
    st.lists(st.sets(st.integers(0, 80), min_size=1), min_size=2, max_size=2),
    st.lists(st.sets(st.integers(0, 80)), min_size=2, max_size=2),
)
def test_located_entries_are_the_common_positions(held, wanted):
    longest, most = max(map(len, held)), max(map(len, wanted))
    positions = torch.full((2, longest + 3), -9, dtype=torch.int32)  # invalid memory need not ascend
    asked = torch.full((2, most), NOWHERE, dtype=torch.int32)
    for h in range(2):
        positions[h, : len(held[h])] = torch.tensor(sorted(held[h]))
        asked[h, : len(wanted[h])] = torch.tensor(sorted(wanted[h]), dtype=torch.int32)
    segment = Segment(
        k=torch.zeros(2, longest + 3, 1),
        v=torch.zeros(2, longest + 3, 1),
        lengths=torch.tensor([len(one) for one in held], dtype=torch.int32),
        positions=positions,
    )
    selection = locate(segment, asked)
    back = positions_of(segment, selection)
    for h in range(2):
        assert back[h, : int(selection.counts[h])].tolist() == sorted(held[h] & wanted[h])
        assert (back[h, int(selection.counts[h]) :] == NOWHERE).all()


@given(st.integers(1, 60), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 99))
def test_a_choice_over_segments_is_the_choice_over_all(keep, widths, seed):
    scores = torch.randint(0, 9, (2, sum(widths)), generator=torch.Generator().manual_seed(seed)).float()
    (whole,) = choose(scores, [sum(widths)], keep)
    first, parts = 0, choose(scores, widths, keep)
    for h in range(2):
        listed, first = [], 0
        for part, width in zip(parts, widths, strict=True):
            mine = part.indices[h, : int(part.counts[h])]
            assert ((mine >= 0) & (mine < width)).all()
            listed += (mine + first).tolist()
            first += width
        assert listed == whole.indices[h, : int(whole.counts[h])].tolist()


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_compacting_keeps_the_valid_ones(valid):
    entries = torch.randperm(len(valid))[None]
    selection = compact(entries, torch.tensor([valid]))
    expected = sorted(int(e) for e, v in zip(entries[0], valid, strict=True) if v)
    assert selection.indices[0, : int(selection.counts[0])].tolist() == expected


# ---------------------------------------------------------------------------------- generation


@given(
    total=st.integers(1, 90),
    new=st.integers(1, 90),
    border=st.integers(0, 90),
    block=st.integers(1, 9),
    step=st.integers(1, 4),
    init=st.integers(0, 20),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_anchor_regions_tile_the_sequence_wherever_a_call_begins(total, new, border, block, step, init, seed):
    """``theta = inf`` is dense and ``-inf`` is the near regions alone, for any shape and any cut."""
    new = min(new, total)
    make = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, total, 16, generator=make) for _ in "kv")
    q = torch.randn(new, 4, 16, generator=make)
    positions = torch.arange(total - new, total, dtype=torch.int32)
    spec = AttentionSpec(scale=0.25)

    def segment(first: int, last: int) -> Segment:
        return Segment(
            k=k[:, first:last],
            v=v[:, first:last],
            lengths=torch.full((2,), last - first, dtype=torch.int32),
            start=first,
        )

    segments = tuple(
        segment(a, b) for a, b in ((0, min(border, total)), (min(border, total), total)) if a < b
    )
    i, j = positions[:, None].long(), torch.arange(total)[None]
    rows = block * step
    for theta, seen in (
        (math.inf, j <= i),
        (-math.inf, (j <= i) & ((j < init) | (j >= i // rows * rows))),
    ):
        part = Anchor(theta=theta, block=block, step=step, init=init)
        ctx = PrefillLayer(
            layer=0,
            layers=1,
            q=q,
            query_positions=positions,
            segments=segments,
            spec=spec,
            prompt_end=int(positions[-1]) + 1,
        )
        results = []
        for pattern, one in zip(part.patterns(ctx, None), segments, strict=True):
            results.append(pattern.done)
            if pattern.form is not None:
                results.append(prefill(q, one, spec=spec, query_positions=positions, form=pattern.form))
        out = merge(results)
        logits = torch.einsum("tnd,nsd->nts", q, k.repeat_interleave(2, 0)) * 0.25
        probs = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = torch.einsum("nts,nsd->tnd", probs, v.repeat_interleave(2, 0))
        assert out.pairs == 4 * int(seen.sum())
        torch.testing.assert_close(out.out, expected, atol=2e-5, rtol=0)
