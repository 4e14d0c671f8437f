"""EpiCache: probe, budgets, bounded peak and episodes, each against a computation of the test's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import winnow
from winnow.compression.budgets.sensitivity import layer_budgets
from winnow.compression.scorers.peak_attention import PeakAttention
from winnow.engine.request import SamplingParams
from winnow.episodes import cluster, hashed_ngrams
from winnow.methods import load
from winnow.profiles import save_profile
from winnow.tune.layer_sensitivity import layer_sensitivity
from winnow.types import AttentionSpec, Observation, Profile, Segment

LAYERS, HEADS, GROUP, SIZE = 4, 2, 2, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        head_dim=SIZE,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def profile(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "layers.safetensors"
    fingerprint = winnow.load(model).model.fingerprint
    tensors = {"cosine": torch.tensor([0.99, 0.6, 0.8, 0.3])}
    save_profile(Profile(kind="layer-sensitivity", model=fingerprint, tensors=tensors), path)
    return str(path)


def prompt(n, seed=0):
    return torch.randint(128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---------------------------------------------------------------------------------- scores


def test_the_score_is_the_peak_over_queries_and_heads():
    make = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(7, HEADS * GROUP, SIZE, generator=make)
    k = torch.randn(HEADS, 50, SIZE, generator=make)
    seen = Observation(
        layer=0,
        layers=1,
        spec=AttentionSpec(scale=SIZE**-0.5),
        segment=Segment(k=k, v=k, lengths=torch.tensor([50, 50], dtype=torch.int32)),
        tokens=50,
        queries=q,
        query_positions=torch.arange(50, 57, dtype=torch.int32),
    )
    value = PeakAttention().score(seen, None).value
    for h in range(HEADS):
        rows = [
            (q[i, n] @ k[h].T * SIZE**-0.5).softmax(-1)
            for i in range(7)
            for n in range(h * GROUP, (h + 1) * GROUP)
        ]
        torch.testing.assert_close(value[h], torch.stack(rows).amax(0), atol=1e-6, rtol=1e-5)


def test_the_last_tokens_as_probe_are_a_snapkv_by_maximum():
    """Queries of the prompt's end see what lies before them; later entries of the window get no vote."""
    make = torch.Generator().manual_seed(1)
    q = 2 * torch.randn(5, HEADS * GROUP, SIZE, generator=make)
    k = torch.randn(HEADS, 40, SIZE, generator=make)
    seen = Observation(
        layer=0,
        layers=1,
        spec=AttentionSpec(scale=SIZE**-0.5),
        segment=Segment(k=k, v=k, lengths=torch.tensor([40, 40], dtype=torch.int32)),
        tokens=40,
        queries=q,
        query_positions=torch.arange(35, 40, dtype=torch.int32),
    )
    value = PeakAttention().score(seen, None).value
    causal = torch.arange(40)[None] <= torch.arange(35, 40)[:, None]
    for h in range(HEADS):
        logits = torch.einsum("wnd,sd->nws", q[:, h * GROUP : (h + 1) * GROUP], k[h]) * SIZE**-0.5
        weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        torch.testing.assert_close(value[h], weights.amax((0, 1)), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------- budgets


@given(
    st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=12),
    st.integers(4, 500),
    st.floats(0, 6),
)
@settings(deadline=None)
def test_budgets_add_up_and_keep_their_floor(cosines, keep, power):
    profile = Profile(kind="layer-sensitivity", model="", tensors={"cosine": torch.tensor(cosines)})
    budgets = layer_budgets(profile, keep, power)
    assert sum(budgets) == keep * len(cosines)
    assert min(budgets) >= keep // 4
    order = sorted(range(len(cosines)), key=lambda i: cosines[i])
    assert all(budgets[a] >= budgets[b] - 1 for a, b in pairwise(order))


def test_budgets_follow_the_formula():
    cosine = torch.tensor([0.9, 0.5, 0.7])
    profile = Profile(kind="layer-sensitivity", model="", tensors={"cosine": cosine})
    # Scaled: 1, 0, 0.5. Weights 0, 1, 0.5^1.1; the first is raised to a quarter of the mean.
    free = 300 - 25
    second = free / (1 + 0.5**1.1)
    assert layer_budgets(profile, 100, 1.1) == pytest.approx([25, second, free - second], abs=1)


# ---------------------------------------------------------------------------------- blocks and probe


def test_one_block_with_room_for_all_is_plain_prefill(model, profile):
    recipe = load("epicache", keep=1000, block=64, profile=profile)
    ours = winnow.load(model, recipe=recipe).read(prompt(150), probe=prompt(20, 5))
    plain = winnow.load(model).read(prompt(150))
    with ours, plain:
        question = prompt(9, 3)
        a, b = (s.generate(question, max_new_tokens=8, ignore_eos=True) for s in (ours, plain))
        assert a.token_ids == b.token_ids


def test_the_peak_is_budget_and_block(model, profile):
    block, keep = 64, 48
    llm = winnow.load(
        model,
        recipe=load("epicache", keep=keep, block=block, profile=profile, heads="uniform"),
    )
    budgets = layer_budgets(
        Profile(
            kind="layer-sensitivity",
            model="",
            tensors={"cosine": torch.tensor([0.99, 0.6, 0.8, 0.3])},
        ),
        keep,
        1.1,
    )
    engine, sequence = llm.engine, llm.engine.new_sequence()
    sequence.probe = prompt(30, 7)
    peaks = [0] * LAYERS
    append = sequence.store.append

    def watched(layer, k, v, positions):
        append(layer, k, v, positions)
        peaks[layer] = max(peaks[layer], *sequence.store.lengths(layer))

    sequence.store.append = watched
    engine.submit(prompt(700), SamplingParams(max_new_tokens=1, ignore_eos=True), sequence=sequence)
    for _ in engine.events():
        pass
    for layer, budget in enumerate(budgets):
        assert sequence.store.lengths(layer) == [budget] * HEADS
        assert peaks[layer] <= budget + block
    sequence.close()


def test_the_probe_leaves_no_trace_but_its_choice(model, profile):
    recipe = load("epicache", keep=40, profile=profile)
    llm = winnow.load(model, recipe=recipe)
    sessions = [llm.read(prompt(200), probe=prompt(25, seed)) for seed in (1, 2)]
    try:
        kept = [s._session.head_entries() for s in sessions]
        assert [sum(map(sum, one)) for one in kept] == [40 * LAYERS * HEADS] * 2
        assert [s.tokens for s in sessions] == [prompt(200)] * 2
        positions = [s._session._sequence.store.decoded(1).positions_of(0).tolist() for s in sessions]
        assert positions[0] != positions[1], "another probe keeps other entries"
        assert max(positions[0]) < 200
    finally:
        for session in sessions:
            session.close()


def test_a_probe_beyond_the_model_is_refused(model, profile):
    llm = winnow.load(model, recipe=load("epicache", keep=40, profile=profile))
    with pytest.raises(ValueError, match="shorten it"):
        llm.read(prompt(2000), probe=prompt(60))
    assert not llm.engine.busy


# ---------------------------------------------------------------------------------- the profile


def test_a_window_over_everything_changes_no_key(model):
    ours = winnow.load(model).model
    text = prompt(120)
    near = layer_sensitivity(ours, text, window=40, sinks=2).tensors["cosine"]
    assert near[0] == pytest.approx(1.0, abs=1e-5), "the first layer's keys see no attention"
    assert float(near[1:].max()) < 0.9999
    # Every token of 120 lies within the last 119 before it.
    wide = layer_sensitivity(ours, text, window=118, sinks=1).tensors["cosine"]
    assert float(wide.min()) > float(near.min())
    with pytest.raises(ValueError, match="give more than"):
        layer_sensitivity(ours, text, window=200, sinks=0)


# ---------------------------------------------------------------------------------- episodes


TOPICS = {
    "garden": ["The tomatoes need water. ", "We planted basil and roses. ", "Weeds grow near the roses. "],
    "trains": ["The express leaves at noon. ", "Platform four is closed. ", "The conductor checks tickets. "],
    "music": ["She tunes the old violin. ", "The orchestra plays Brahms. ", "The cello solo was lovely. "],
}


def test_clusters_are_the_topics():
    texts = [text * 3 for part in zip(*TOPICS.values(), strict=True) for text in part]
    vectors = torch.zeros(9, 6)
    for i in range(9):
        vectors[i, i % 3] = 1.0
        vectors[i, 3 + i // 3] = 0.2
    found = cluster(vectors, 3, medoids=2)
    assert sorted(one.segments for one in found) == [(0, 3, 6), (1, 4, 7), (2, 5, 8)]
    assert all(len(one.medoids) == 2 and set(one.medoids) <= set(one.segments) for one in found)
    assert [one.medoids for one in cluster(vectors, 3, medoids=2)] == [one.medoids for one in found]
    ngrams = torch.nn.functional.normalize(hashed_ngrams([*texts, "water the tomatoes and roses"]), dim=1)
    nearest = int((ngrams[:9] @ ngrams[9]).argmax())
    assert nearest % 3 == 0, "a question about the garden is nearest to the garden"


def test_questions_go_to_their_topic(tmp_path):
    llm = winnow.load("embedded")
    path = tmp_path / "layers.safetensors"
    save_profile(
        Profile(
            kind="layer-sensitivity",
            model=llm.model.fingerprint,
            tensors={"cosine": torch.linspace(0.9, 0.3, llm.model.layers)},
        ),
        path,
    )
    history = [line for lines in TOPICS.values() for line in lines * 4]
    small = winnow.load("embedded", recipe=load("epicache", keep=48, profile=str(path)))
    with small.episodes(history, count=3, utterances=3, medoids=2) as episodes:
        assert len(episodes.episodes) == 3
        chosen = {
            name: episodes.nearest(question)
            for name, question in (
                ("garden", "Who waters the tomatoes and roses?"),
                ("trains", "When does the express leave, from which platform?"),
                ("music", "Who plays the violin in the orchestra?"),
            )
        }
        assert len(set(chosen.values())) == 3
        first = episodes.ask("Who waters the roses?", max_new_tokens=4, ignore_eos=True)
        again = episodes.ask("Who waters the roses?", max_new_tokens=4, ignore_eos=True)
        assert first.token_ids == again.token_ids, "a question leaves the cache as it was"
        assert sum(episodes.bytes_stored().values()) > 0
    with pytest.raises(ValueError, match="'epicache'"):
        llm.episodes(history)
