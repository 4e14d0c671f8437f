"""Generation against `transformers`' own: greedy tokens, batches, chunks, samples, turns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import winnow
from tests.engine.conftest import VOCABULARY, prompt
from winnow.engine.request import SamplingParams
from winnow.engine.sampling import filtered
from winnow.engine.scheduler import Limits, share
from winnow.methods import load as recipe_named
from winnow.recipe import Recipe


def test_greedy_tokens_equal_those_of_transformers(llm, oracle):
    ids = prompt(50)
    assert llm.generate(ids, max_new_tokens=12).token_ids == oracle(ids, 12)


@pytest.mark.parametrize("batched", [7, 64, 4096])
def test_ragged_batch_in_chunks_equals_each_prompt_alone(module, oracle, batched):
    prompts = [prompt(n, seed=n) for n in (1, 63, 130, 5)]
    llm = winnow.load(module, recipe=Recipe(), max_num_batched_tokens=batched, max_num_seqs=3)
    results = llm.generate(prompts, max_new_tokens=6)
    assert [r.token_ids for r in results] == [oracle(p, 6) for p in prompts]
    assert [r.stats.tokens_computed for r in results] == [1, 63, 130, 5]


def test_scores_computed_and_bytes_are_those_of_dense_attention(llm, module):
    n, new = 40, 5
    stats = llm.generate(prompt(n), max_new_tokens=new, ignore_eos=True).stats
    c = module.config
    # Of the last layer only the last row is read.
    scores = (c.num_hidden_layers - 1) * n * (n + 1) // 2 + n
    assert stats.score_entries == c.num_attention_heads * scores
    entry = 2 * c.head_dim * 4 * c.num_key_value_heads * c.num_hidden_layers
    steps = range(n + 1, n + new)
    assert stats.bytes_read == {"host/raw": entry * sum(steps)}
    # Live allocations are whole memory pages, of which each head's run may waste a part of one.
    regions = 2 * c.num_key_value_heads * c.num_hidden_layers
    exact = entry * (n + new - 1)
    assert exact <= stats.bytes_stored["host/raw"] <= exact + regions * 4096


def test_turns_of_a_session_equal_one_long_prompt(llm, oracle):
    first, second = prompt(30, 1), prompt(17, 2)
    with llm.session() as session:
        one = session.generate(first, max_new_tokens=4)
        assert one.token_ids == oracle(first, 4)
        two = session.generate(second, max_new_tokens=4)
    assert two.token_ids == oracle([*first, *one.token_ids, *second], 4)
    # The last token of the first answer was never run through the model before.
    assert (two.stats.tokens_reused, two.stats.tokens_computed) == (33, 18)


def test_forks_share_a_context_and_do_not_see_each_other(llm, oracle):
    context, questions = prompt(60, 1), [prompt(9, s) for s in (2, 3)]
    with llm.session() as session:
        start = session.generate(context, max_new_tokens=1)
        for question in questions:
            with session.fork() as fork:
                answer = fork.generate(question, max_new_tokens=5)
                assert answer.stats.tokens_reused == 60
                assert answer.token_ids == oracle([*context, *start.token_ids, *question], 5)
        again = session.generate(questions[0], max_new_tokens=5)
        assert again.token_ids == oracle([*context, *start.token_ids, *questions[0]], 5)


def test_rewound_session_continues_as_if_nothing_had_come_after(llm, oracle):
    first, second = prompt(40, 1), prompt(20, 2)
    with llm.session() as session:
        session.generate(first, max_new_tokens=4)
        session._session.rewind(30)
        assert session.tokens == first[:30]
        two = session.generate(second, max_new_tokens=4)
    assert two.token_ids == oracle([*first[:30], *second], 4)
    assert two.stats.tokens_reused == 30


def test_session_does_not_rewind_into_what_was_compressed(module):
    llm = winnow.load(module, recipe=recipe_named("snapkv", keep=40))
    with llm.session() as session:
        session.generate(prompt(100, 1), max_new_tokens=4)
        with pytest.raises(ValueError, match="new session"):
            session._session.rewind(60)
        session._session.rewind(101)
        assert len(session.tokens) == 101


def test_streaming_gives_the_same_tokens(llm):
    ids = prompt(20)
    events = list(llm.stream(ids, max_new_tokens=7))
    assert [e.token for e in events] == llm.generate(ids, max_new_tokens=7).token_ids
    assert events[-1].sample.finish_reason == "length"


def test_samples_share_one_prompt_and_are_reproducible(llm):
    ids = prompt(30)
    options = {"max_new_tokens": 8, "n": 3, "temperature": 1.5, "seed": 11}
    result = llm.generate(ids, **options)
    assert len({tuple(s.token_ids) for s in result.samples}) == 3
    assert result.stats.tokens_computed == 30
    again = llm.generate(ids, **options)
    assert [s.token_ids for s in again.samples] == [s.token_ids for s in result.samples]
    alone = llm.generate(ids, **{**options, "n": 1})
    assert alone.token_ids == result.samples[0].token_ids


def test_sampled_frequencies_follow_the_model(llm, module):
    ids, params = prompt(12), {"temperature": 1.0, "top_k": 5, "max_new_tokens": 1}
    with torch.inference_mode():
        logits = module(torch.tensor([ids])).logits[0, -1]
    expected = filtered(logits, SamplingParams(temperature=1.0, top_k=5))
    drawn = torch.zeros(VOCABULARY)
    for sample in llm.generate(ids, n=400, seed=5, **params).samples:
        drawn[sample.token_ids[0]] += 1
    assert int((drawn > 0).sum()) <= 5
    # Four standard deviations of a binomial proportion.
    assert float((drawn / 400 - expected).abs().max()) < 4 * (0.25 / 400) ** 0.5


def test_logprobs_are_those_of_the_model(llm, module):
    ids = prompt(25)
    result = llm.generate(ids, max_new_tokens=3, logprobs=2)
    with torch.inference_mode():
        logits = module(torch.tensor([[*ids, *result.token_ids]])).logits[0]
    for i, record in enumerate(result.samples[0].logprobs):
        expected = torch.log_softmax(logits[len(ids) - 1 + i], -1)
        assert record["logprob"] == pytest.approx(float(expected[record["token_id"]]), abs=1e-4)
        assert [t for t, _ in record["top"]] == torch.topk(expected, 2).indices.tolist()


@given(
    # On a grid: equal logits are ties, and no two differ by less than the rounding of a softmax.
    logits=st.lists(st.integers(-64, 64).map(lambda i: i / 8), min_size=2, max_size=20),
    top_p=st.floats(0.05, 1.0),
    top_k=st.integers(0, 25),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.1, 3.0),
)
@settings(max_examples=200, deadline=None)
def test_filters_keep_the_likeliest_tokens_and_sum_to_one(logits, top_p, top_k, min_p, temperature):
    row = torch.tensor(logits)
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    probs = filtered(row, params)
    assert float(probs.sum()) == pytest.approx(1.0)
    assert bool((probs[row == row.max()] > 0).any())
    kept, dropped = row[probs > 0], row[probs == 0]
    if dropped.numel():
        assert float(kept.min()) >= float(dropped.max())
    full = torch.softmax(row.double() / temperature, -1)
    assert bool((full[probs > 0] >= min_p * full.max() - 1e-12).all())


@given(
    pending=st.lists(
        st.tuples(st.integers(1, 300), st.sampled_from([1, 16, 64]), st.integers(0, 400)), max_size=8
    ),
    limit=st.integers(1, 256),
)
def test_every_step_advances_and_chunks_end_at_their_multiples(pending, limit):
    shares = share(pending, Limits(max_num_batched_tokens=limit))
    assert len(shares) == len(pending)
    assert any(shares) or not pending
    for (tokens, multiple, computed), count in zip(pending, shares, strict=True):
        assert 0 <= count <= tokens
        assert count in (0, tokens) or (computed + count) % multiple == 0
        if tokens == 1:
            assert count == 1  # a long prompt never stalls who decodes
    greedy = max((m for _, m, _ in pending), default=1)
    assert sum(shares) <= max(limit, len(pending), greedy)


def test_prefix_reuse_is_exact_and_salted(module, oracle):
    llm = winnow.load(module, recipe=recipe_named("prefix-reuse"))
    shared = prompt(200, 1)
    a, b = [*shared, *prompt(20, 2)], [*shared, *prompt(31, 3)]
    assert llm.generate(a, max_new_tokens=4).stats.tokens_reused == 0
    hit = llm.generate(b, max_new_tokens=4)
    assert hit.token_ids == oracle(b, 4)
    assert hit.stats.tokens_reused == 192  # whole pages of 64
    assert llm.generate(b, max_new_tokens=4, salt="another client").stats.tokens_reused == 0


def test_finished_requests_leave_nothing_behind(llm):
    llm.generate([prompt(100, 1), prompt(50, 2)], max_new_tokens=3)
    assert llm.engine._running == []
    assert llm.engine._waiting == []
