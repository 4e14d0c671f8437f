"""One recipe over all four stages, with chunks, batches and turns."""

from __future__ import annotations

import math

import pytest

import winnow
from tests.engine.conftest import prompt
from winnow.compression.actions.demote import Demote
from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.everything import Everything
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.generation.anchor import Anchor
from winnow.loading.tidal import Tidal
from winnow.recipe import Recipe
from winnow.retrieval.radix import Radix


def four(*, theta: float, keep: int, read: int) -> Recipe:
    return Recipe(
        generation=Anchor(theta=theta, block=8, step=4, init=8),
        compression=Compress(score=WindowAttention(window=16, pool=5), budget=Uniform(keep=keep), act=Drop()),
        loading=Tidal(keep=read, dense_layers=1, select_layers=(1,)),
        retrieval=Radix(page=16),
    )


@pytest.mark.parametrize("batched", [32, 100, 4096])
def test_at_its_limits_it_is_full_attention(module, oracle, batched):
    llm = winnow.load(module, recipe=four(theta=math.inf, keep=512, read=512), max_num_batched_tokens=batched)
    shared = prompt(128, 9)
    prompts = [[*shared, *prompt(n, n)] for n in (3, 70, 150)]
    for _ in range(2):  # the second time from the pool
        results = llm.generate(prompts, max_new_tokens=5)
        assert [r.token_ids for r in results] == [oracle(p, 5) for p in prompts]
    # The last 16 queries of a prompt vote, so they are computed: of 131 tokens whole blocks of 32 below 115.
    reused = [r.stats.tokens_reused for r in results]
    assert all(n >= least for n, least in zip(reused, (96, 128, 128), strict=True))


def test_each_stage_saves_what_it_promises(module):
    text, options = prompt(400, 1), {"max_new_tokens": 6, "ignore_eos": True}
    full = winnow.load(module).generate(text, **options).stats
    llm = winnow.load(module, recipe=four(theta=-math.inf, keep=100, read=20))
    first = llm.generate(text, **options).stats
    assert first.score_entries < 0.3 * full.score_entries
    entries = module.config.num_key_value_heads * module.config.num_hidden_layers
    assert (first.entries_before, first.entries_after) == (400 * entries, 100 * entries)
    assert sum(first.bytes_stored.values()) < 0.5 * sum(full.bytes_stored.values())
    # Two of four layers read 20 entries, the others 100 and what was generated since.
    assert first.bytes_read_per_token < 0.2 * full.bytes_read_per_token
    second = llm.generate(text, **options).stats
    assert second.tokens_reused == 384  # whole chunks of block * step = 32, one token short of all
    assert second.tokens_computed == 16


def test_reuse_under_sparse_prefill_gives_what_a_fresh_prefill_gives(module):
    recipe = four(theta=2.0, keep=120, read=30)
    text, options = prompt(300, 4), {"max_new_tokens": 6, "logprobs": 0}
    llm = winnow.load(module, recipe=recipe)
    llm.generate([*text[:256], *prompt(40, 5)], **options)
    reused = llm.generate(text, **options)
    fresh = winnow.load(module, recipe=recipe).generate(text, **options)
    assert reused.stats.tokens_reused == 256
    assert reused.token_ids == fresh.token_ids
    for a, b in zip(reused.samples[0].logprobs, fresh.samples[0].logprobs, strict=True):
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)


def test_turns_after_compression_continue_at_true_positions(module):
    llm = winnow.load(module, recipe=four(theta=math.inf, keep=64, read=64))
    with llm.session() as session:
        session.generate(prompt(200, 1), max_new_tokens=3)
        two = session.generate(prompt(30, 2), max_new_tokens=3)
        store = session._session._sequence.store
        assert store.length == 200 + 3 + 30 + 2
        # The first turn left 64 of its 200 entries; everything since is there.
        assert store.lengths(0) == [64 + 35] * 2
        assert two.stats.tokens_computed == 31
        positions = store.decoded(0).positions_of(0).tolist()
    assert positions[-35:] == list(range(200, 235))
    assert positions[0] < 200


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_demoted_entries_are_read_from_their_codec(module, codec):
    recipe = Recipe(
        compression=Compress(score=Recency(), budget=Everything(), act=Demote(codec=codec, recent=16))
    )
    text, options = prompt(400, 1), {"max_new_tokens": 8, "logprobs": 0, "ignore_eos": True}
    full = winnow.load(module).generate(text, **options)
    small = winnow.load(module, recipe=recipe).generate(text, **options)
    assert small.stats.bytes_read[f"host/{codec}"] > 0
    assert small.stats.bytes_stored[f"host/{codec}"] > 0
    assert sum(small.stats.bytes_read.values()) < 0.5 * sum(full.stats.bytes_read.values())
    gaps = [
        abs(a["logprob"] - b["logprob"])
        for a, b in zip(small.samples[0].logprobs, full.samples[0].logprobs, strict=True)
    ]
    assert gaps[0] < 1e-4  # prefill comes before the demotion
    assert 0 < max(gaps) < 0.5


def test_a_sequence_does_not_see_its_neighbours(module):
    recipe = four(theta=3.0, keep=60, read=20)
    prompts = [prompt(n, n) for n in (90, 200, 131)]
    together = winnow.load(module, recipe=recipe).generate(prompts, max_new_tokens=6)
    for text, result in zip(prompts, together, strict=True):
        alone = winnow.load(module, recipe=recipe).generate(text, max_new_tokens=6)
        assert alone.token_ids == result.token_ids
