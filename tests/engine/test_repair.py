"""Chunks that are reused elsewhere, and repaired: the check list of CacheBlend, through `winnow.load`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import winnow
from tests.parity.families import VOCAB, make
from winnow import Chunks
from winnow.methods import load
from winnow.retrieval.blend import Blend


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


A, B, C, Q = ids(30, 1), ids(41, 2), ids(25, 3), ids(7, 4)
FAMILIES = ["llama", "yarn", "gemma3", "glm4", "cohere2", "gpt-oss", "phi3-longrope"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make("llama")


def dense(model: Any, **options: Any) -> Any:
    # Beyond 64 positions longrope changes its frequencies; its long regime holds throughout here.
    long = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "longrope"
    return winnow.load(model, long_positions=long, **options)


def blend(model: Any, **options: Any) -> Any:
    return dense(model, recipe=load("cacheblend", **options))


def answer(llm: Any, prompt: Any, **options: Any) -> Any:
    return llm.generate(prompt, **{"max_new_tokens": 5, "ignore_eos": True, "logprobs": VOCAB} | options)


def logprobs(result: Any, step: int = 0) -> torch.Tensor:
    out = torch.empty(VOCAB)
    for token, value in result.samples[0].logprobs[step]["top"]:
        out[token] = value
    return out


def alike(a: Any, b: Any, atol: float = 2e-4) -> None:
    assert a.token_ids == b.token_ids
    torch.testing.assert_close(logprobs(a), logprobs(b), atol=atol, rtol=1e-4)


def entries(llm: Any, prompt: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer keys and values ``[H, S, D]`` after the prompt."""
    with llm.session() as session:
        session.generate(prompt, max_new_tokens=1, ignore_eos=True)
        store = session._session._sequence.store
        found = [store.decoded(layer) for layer in range(store.layers)]
        return [(s.k[:, : store.length].clone(), s.v[:, : store.length].clone()) for s in found]


# ------------------------------------------------------------------ the limits


def test_recomputing_everything_is_full_prefill(model: Any) -> None:
    """Also with the chunks already in the pool, and computed in several pieces."""
    full = answer(dense(model), A + B + C + Q)
    llm = blend(model, recompute=(100,))
    alike(answer(llm, Chunks([A, B, C, Q])), full)
    again = answer(llm, Chunks([A, B, C, Q]))
    alike(again, full)
    stats = again.stats
    assert (stats.tokens_reused, stats.tokens_approximate, stats.tokens_computed) == (30, 66, 7)
    assert stats.tokens_repaired == 66
    pieces = dense(model, recipe=load("cacheblend", recompute=(100,)), max_num_batched_tokens=16)
    alike(answer(pieces, Chunks([A, B, C, Q])), full)


def test_one_chunk_in_front_is_a_prefix(model: Any) -> None:
    """Nothing before it: no deviation, nothing to repair, the answer of prefix reuse."""
    llm = blend(model)
    answer(llm, Chunks([A, Q]))
    got = answer(llm, Chunks([A, Q]))
    alike(got, answer(dense(model), A + Q))
    stats = got.stats
    assert (stats.tokens_reused, stats.tokens_approximate, stats.tokens_repaired) == (30, 0, 0)
    assert stats.tokens_computed == len(Q)


def test_a_shifted_chunk_without_repair_is_turned_reuse(model: Any) -> None:
    """Keys of the second chunk are those of the model at the new positions, given no context; values too."""
    llm = blend(model, recompute=(0,))
    placed = entries(llm, Chunks([A, B, Q]))
    apart = entries(dense(model), B + Q)
    rotaries = [llm.model.rotary(layer) for layer in range(llm.model.layers)]
    for (k, v), (k_old, v_old), rotary in zip(placed, apart, rotaries, strict=True):
        keys = k_old[:, : len(B)]
        moved = keys if rotary is None else rotary.turn(keys, torch.full((len(B),), len(A)))
        torch.testing.assert_close(k[:, len(A) : len(A) + len(B)], moved, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v[:, len(A) : len(A) + len(B)], v_old[:, : len(B)], atol=1e-5, rtol=1e-5)


def test_layer_zero_is_exact_without_any_repair(model: Any) -> None:
    """Its keys and values know no context, so a turned chunk is what a fresh prefill gives."""
    placed = entries(blend(model, recompute=(0,)), Chunks([A, B, Q]))
    fresh = entries(dense(model), A + B + Q)
    for one, other in zip(placed[0], fresh[0], strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(placed[2][1], fresh[2][1], atol=1e-2)


# ------------------------------------------------------------------ causality


def test_what_comes_later_changes_no_repaired_entry(llama: Any) -> None:
    """A token after a repaired one is perturbed: keys and values of the repaired one stay, to the bit."""
    other = list(C)
    other[3] = (other[3] + 11) % VOCAB
    llm = blend(llama, recompute=(40,))
    one, two = entries(llm, Chunks([A, B, C, Q])), entries(llm, Chunks([A, B, other, Q]))
    before = len(A) + len(B)
    # The same tokens of B must have been chosen for the comparison to mean anything.
    for layer in range(llm.model.layers):
        for x, y in zip(one[layer], two[layer], strict=True):
            same = (x[:, :before] == y[:, :before]).all(-1).all(0)
            # A token of B that one prompt repaired and the other did not may differ; few can.
            assert int((~same).sum()) <= 4, layer
            assert torch.equal(x[:, : len(A)], y[:, : len(A)])


def test_repaired_rows_do_not_see_later_ones(llama: Any) -> None:
    """With every token repaired but the last chunk replaced whole, nothing before it moves a bit."""
    llm = blend(llama, recompute=(100,))
    one, two = entries(llm, Chunks([A, B, C, Q])), entries(llm, Chunks([A, B, ids(25, 77), Q]))
    for layer in range(llm.model.layers):
        for x, y in zip(one[layer], two[layer], strict=True):
            assert torch.equal(x[:, : len(A) + len(B)], y[:, : len(A) + len(B)])


# ------------------------------------------------------------------ what it buys


def error(llm: Any, full: torch.Tensor, prompt: Any) -> float:
    got = logprobs(answer(llm, prompt, max_new_tokens=1))
    return float((full.exp() * (full - got)).sum())  # KL of the next token's distribution


def test_more_repair_is_closer_to_full_prefill(llama: Any) -> None:
    """KL from full prefill falls with the share, summed over prompts."""
    shares, total = (0, 25, 60, 100), dict.fromkeys((0, 25, 60, 100), 0.0)
    llms = {share: blend(llama, recompute=(share,)) for share in shares}
    plain = dense(llama)
    for seed in range(8):
        pieces = [ids(30, 10 * seed + i) for i in range(1, 5)]
        flat = [token for piece in pieces for token in piece]
        full = logprobs(answer(plain, flat, max_new_tokens=1))
        for share in shares:
            total[share] += error(llms[share], full, Chunks(pieces))
    assert total[0] > total[25] > total[60] > total[100]
    assert total[100] < 1e-4 < total[60]


def test_gradual_filtering_ends_with_its_last_share(llama: Any) -> None:
    stats = answer(blend(llama, recompute=(50, 20)), Chunks([A, B, C, Q])).stats
    assert stats.tokens_repaired == (len(B) + len(C)) * 20 // 100
    once = answer(blend(llama, recompute=(20,)), Chunks([A, B, C, Q])).stats
    assert once.tokens_repaired == stats.tokens_repaired
    assert once.score_entries < stats.score_entries


def test_repair_computes_fewer_scores_than_prefill(llama: Any) -> None:
    llm = blend(llama)
    answer(llm, Chunks([A, B, C, Q]))
    reused = answer(llm, Chunks([A, C, B, Q])).stats
    full = answer(winnow.load(llama), A + C + B + Q).stats
    assert reused.tokens_approximate == len(B) + len(C)
    assert reused.score_entries < 0.6 * full.score_entries
    assert full.tokens_approximate == full.tokens_repaired == 0


# ------------------------------------------------------------------ keys and pools


def test_reuse_in_another_order_answers_as_the_first_time(llama: Any) -> None:
    used, fresh = blend(llama), blend(llama)
    for order in ([A, B, C, Q], [C, A, B, Q], [B, A, Q]):
        answer(used, Chunks(order))
    alike(answer(used, Chunks([B, C, A, Q])), answer(fresh, Chunks([B, C, A, Q])), atol=1e-6)


def test_chunks_in_four_bits_take_a_fraction_and_answer_alike(llama: Any) -> None:
    long = [ids(64, seed) for seed in (5, 6)]
    raw, small = blend(llama, recompute=(100,)), blend(llama, recompute=(100,), codec="int4")
    alike(answer(raw, Chunks([*long, Q])), answer(small, Chunks([*long, Q])))  # nothing stored is used
    # Memory comes in whole pages of the machine, so small tables are compared by what they hold.
    half = blend(llama, recompute=(30,), codec="int4")
    answer(half, Chunks([*long, Q]))
    again = answer(half, Chunks([*long, Q])).stats
    # Rounded, so not even the first chunk is exact.
    assert (again.tokens_reused, again.tokens_approximate) == (0, 128)
    assert again.tokens_repaired == 128 * 30 // 100
    chunk = half.engine.repair.pool.find(long[1], (), half.engine._namespace("") + "/chunks")
    assert chunk is not None
    assert {segment.codec for segment in chunk.store.segments(1)} == {"int4"}
    assert sum(s.bytes_per_entry for s in chunk.store.segments(1)) < 0.4 * 2 * 16 * 4


def test_salts_share_no_chunk(llama: Any) -> None:
    llm = blend(llama)
    answer(llm, Chunks([A, B, Q]))
    assert answer(llm, Chunks([A, B, Q]), salt="other").stats.tokens_approximate == 0
    assert answer(llm, Chunks([A, B, Q])).stats.tokens_approximate == len(B)


def test_chunks_without_a_recipe_for_them_are_a_prompt(llama: Any) -> None:
    llm = winnow.load(llama)
    got = answer(llm, Chunks([A, B, Q]))
    alike(got, answer(llm, A + B + Q), atol=0)
    assert got.prompt_token_ids == A + B + Q


def test_a_prompt_that_is_not_divided_is_computed(llama: Any) -> None:
    got = answer(blend(llama), A + B + Q)
    alike(got, answer(winnow.load(llama), A + B + Q), atol=0)
    assert got.stats.tokens_computed == len(A + B + Q)


def test_several_prompts_with_chunks_share_a_step_with_others(llama: Any) -> None:
    prompts = [Chunks([A, B, Q]), C + Q, Chunks([B, C, ids(40, 8)])]
    together = answer(blend(llama), prompts)
    for prompt, result in zip(prompts, together, strict=True):
        alike(result, answer(blend(llama), prompt))


def test_the_rest_of_the_recipe_acts_on_repaired_entries(llama: Any) -> None:
    """Compression keeps its budget, loading reads its selection, over blended chunks."""
    part = load("cacheblend") | load("snapkv", keep=40, window=4) | load("tidal-decode", keep=16)
    stats = answer(winnow.load(llama, recipe=part), Chunks([A, B, C, Q])).stats
    assert stats.entries_after == 40 * 4 * 2
    exact = load("cacheblend", recompute=(100,)) | load("snapkv", keep=40, window=4)
    alike(
        answer(winnow.load(llama, recipe=exact), Chunks([A, B, C, Q])),
        answer(winnow.load(llama, recipe=load("snapkv", keep=40, window=4)), A + B + C + Q),
    )


def test_sparse_prefill_leaves_no_exact_chunk(llama: Any) -> None:
    part = load("cacheblend") | load("tri-shape", init=4, local=16, last=4)
    llm = winnow.load(llama, recipe=part)
    answer(llm, Chunks([A, B, Q]))
    stats = answer(llm, Chunks([A, B, Q])).stats
    assert (stats.tokens_reused, stats.tokens_approximate) == (0, len(A + B))


def test_chunks_open_a_session(llama: Any) -> None:
    llm = blend(llama, recompute=(100,))
    options = {"max_new_tokens": 4, "ignore_eos": True}
    with llm.session() as session, winnow.load(llama).session() as plain:
        first = session.generate(Chunks([A, B, Q]), **options)
        assert first.token_ids == plain.generate(A + B + Q, **options).token_ids
        assert session.generate(C, **options).token_ids == plain.generate(C, **options).token_ids
        with pytest.raises(ValueError, match="beginning of a session"):
            session.generate(Chunks([A, Q]))


# ------------------------------------------------------------------ refusals and ends


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_that_cannot_move_are_refused_by_name(family: str) -> None:
    with pytest.raises(ValueError, match=f"'{family}' is not supported: its embeddings carry positions"):
        blend(make(family))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recompute": (20, 30)}, "do not increase"),
        ({"recompute": ()}, "do not increase"),
        ({"recompute": (101,)}, "every hundred"),
        ({"recompute": (-1,)}, "at least 0"),
        ({"check_layer": 0}, "at least 1"),
        ({"deviation": "both"}, "keys-and-values"),
        ({"codec": "int5"}, "unknown codec"),
        ({"separator": ""}, "leave it out"),
    ],
)
def test_impossible_parameters(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Blend(**options)


def test_impossible_prompts(llama: Any) -> None:
    with pytest.raises(ValueError, match="at least two pieces"):
        Chunks([A])
    with pytest.raises(ValueError, match="at least two pieces"):
        Chunks("text")
    with pytest.raises(ValueError, match="empty piece"):
        Chunks([A, []])
    with pytest.raises(ValueError, match="4 layers; give a lower one"):
        blend(llama, check_layer=4)


def test_an_interrupted_repair_frees_everything(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside a layer: chunks that were held can be evicted, and the next request is whole."""
    llm = blend(llama)
    answer(llm, Chunks([A, B, Q]))
    repair = llm.engine.repair

    class Breaking:
        def __getattr__(self, name: str) -> Any:
            return getattr(kept, name)

        def layer(self, *_: Any) -> Any:
            raise KeyboardInterrupt

    kept = repair._walk
    monkeypatch.setattr(repair, "_walk", Breaking())
    with pytest.raises(KeyboardInterrupt):
        answer(llm, Chunks([A, B, Q]))
    monkeypatch.undo()
    assert all(chunk.users == 0 for chunk in repair.pool._chunks.values())
    alike(answer(llm, Chunks([A, B, Q])), answer(blend(llama), Chunks([A, B, Q])), atol=1e-6)
