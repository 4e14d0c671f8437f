"""What every method owes once it runs: the contract through `winnow.load`, on a small random model."""

from __future__ import annotations

import dataclasses
import inspect
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import winnow
from winnow.compression.actions.demote import Demote
from winnow.compression.budgets.everything import Everything
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.loading.sketch import Sketch
from winnow.loading.tidal import Tidal
from winnow.methods import METHODS, load, packaged
from winnow.profiles import save_profile
from winnow.recipe import Recipe
from winnow.types import Profile

LAYERS, KV_HEADS, SIZE, VOCABULARY = 5, 2, 16, 128
ENTRY = 2 * SIZE * 4  # bytes of an entry in float32


# Parameters that bite on a prompt of a few hundred tokens, and the limit at which nothing changes.
TIGHT: dict[str, dict[str, Any]] = {
    "a-shape": {"init": 4, "local": 40},
    "tri-shape": {"init": 4, "local": 40, "last": 8},
    "anchor-attention": {"theta": 0.2, "block": 8, "step": 4, "init": 4},
    "pbs-attn": {"block": 8, "segment": 16, "share": 0.5},
    "swiftkv": {"layers": 3, "group": 2},
    "snapkv": {"keep": 40, "window": 8},
    "adakv": {"keep": 40, "window": 8},
    "streaming-llm": {"sinks": 4, "recent": 40, "every": 4, "block": 48},
    "h2o": {"heavy": 24, "recent": 16, "every": 4},
    "d2o": {"heavy": 24, "recent": 16, "every": 4, "dense_first": 1},
    "lazy-eviction": {"keep": 40, "window": 4, "alpha": 0.02},
    "think": {"percent": 60, "keep": 100},
    "zipcache": {"every": 4, "recent": 8, "random": 8},
    "gear": {"bits": 4, "every": 64},
    "mustafar": {"percent": 50, "recent": 8},
    "epicache": {"keep": 40, "block": 128},
    "razor-attention": {"induction": 20, "echo": 10, "buffer": 30, "divisor": 50, "every": 4},
    "prefix-reuse": {"page": 16},
    "cacheblend": {"recompute": (30,)},
    "tidal-decode": {"keep": 24},
    "quest": {"keep": 24, "page": 4},
    "shadowkv": {"keep": 24, "rank": 12, "outliers": 2, "local": 1},
}
LIMIT: dict[str, dict[str, Any]] = {
    "a-shape": {"init": 0, "local": 10_000},
    "tri-shape": {"init": 0, "local": 40, "last": 10_000},
    "anchor-attention": {"theta": math.inf, "block": 8, "step": 4, "init": 4},
    "pbs-attn": {"block": 8, "segment": 16, "share": 1.0},
    "swiftkv": {"layers": LAYERS},
    "snapkv": {"keep": 10_000, "window": 8},
    "adakv": {"keep": 10_000, "window": 8},
    "streaming-llm": {"recent": 10_000},
    "h2o": {"heavy": 10_000},
    "d2o": {"heavy": 10_000},
    "lazy-eviction": {"keep": 10_000},
    "think": {"percent": 0},
    "zipcache": {"high": 16, "low": 16, "every": 4},
    "gear": {"recent": 10_000},
    "mustafar": {"percent": 0},
    "razor-attention": {"buffer": 10_000},
    "epicache": {"keep": 10_000},
    "prefix-reuse": {"page": 16},
    "cacheblend": {"recompute": (100,)},
    "tidal-decode": {"keep": 10_000},
    "quest": {"keep": 10_000},
    "shadowkv": {"keep": 10_000, "rank": 32, "outliers": 2, "local": 1},
}
# Methods that read a profile find one of the model that most tests use, with arbitrary scores.
_DIRECTORY = tempfile.TemporaryDirectory(prefix="winnow-profiles-")  # goes with the process
PROFILES = Path(_DIRECTORY.name)
EVERY = pytest.mark.parametrize("name", [*METHODS, "all four"])


def recipe(name: str, table: dict[str, dict[str, Any]] = TIGHT, query_heads: int = 4) -> Recipe:
    if name != "all four":
        options = table[name]
        if profile := inspect.signature(METHODS[name].make).parameters.get("profile"):
            kind = Path(profile.default).stem
            options = options | {"profile": str(profile_of(query_heads, kind))}
        return load(name, **options)
    out = Recipe()
    for one in ("anchor-attention", "snapkv", "prefix-reuse", "tidal-decode"):
        out = out | recipe(one, table)
    return out


@cache
def profile_of(query_heads: int, kind: str) -> Path:
    path = PROFILES / f"{kind}-{query_heads}.safetensors"
    scores = torch.rand(2, LAYERS, KV_HEADS, generator=torch.Generator().manual_seed(0))
    fingerprint = winnow.load(llama(query_heads)).engine.model.fingerprint
    tensors = {
        "retrieval-heads": {"induction": scores[0], "echo": scores[1]},
        "layer-sensitivity": {"cosine": scores[0, :, 0]},
    }
    save_profile(Profile(kind=kind, model=fingerprint, tensors=tensors[kind]), path)
    return path


def llama(query_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=query_heads,
        num_key_value_heads=KV_HEADS,
        head_dim=SIZE,
        max_position_embeddings=4096,
        initializer_range=0.2,  # attention that depends on its content
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama(4)


@pytest.fixture(scope="module", params=[4, 2], ids=["gqa", "mha"])
def any_model(request) -> LlamaForCausalLM:
    return llama(request.param)


def prompt(length: int, seed: int = 0) -> list[int]:
    make = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=make).tolist()


def in_chunks(prompts):
    """Prompts as a recipe that reuses chunks takes them: in pieces of 64 tokens, the last one computed."""
    if not isinstance(prompts[0], int):
        return [in_chunks(one) for one in prompts]
    pieces = [prompts[first : first + 64] for first in range(0, len(prompts), 64)]
    return winnow.Chunks(pieces) if len(pieces) > 1 else prompts


def answer(llm, prompts, **options):
    """Results, and the likeliest tokens' log-probabilities of every generated token."""
    if llm.engine.repair is not None:
        prompts = in_chunks(prompts)
    options = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": 5} | options
    return llm.generate(prompts, **options)


def alike(a, b, atol: float = 5e-4) -> None:
    assert a.token_ids == b.token_ids
    for x, y in zip(a.samples[0].logprobs, b.samples[0].logprobs, strict=True):
        assert x["logprob"] == pytest.approx(y["logprob"], abs=atol)


def test_the_tables_cover_every_method():
    assert set(TIGHT) == set(LIMIT) == set(METHODS)


@EVERY
@pytest.mark.parametrize("length", [1, 63, 1000])
def test_at_its_limit_equals_full_attention(any_model, name, length):
    given = prompt(length)
    full = answer(winnow.load(any_model), given)
    heads = any_model.config.num_attention_heads
    alike(answer(winnow.load(any_model, recipe=recipe(name, LIMIT, heads)), given), full)


@EVERY
def test_sequences_in_a_batch_do_not_influence_each_other(model, name):
    prompts = [prompt(200, 1), prompt(63, 2), prompt(1, 3), prompt(131, 4)]
    together = answer(winnow.load(model, recipe=recipe(name)), prompts)
    for given, result in zip(prompts, together, strict=True):
        alike(result, answer(winnow.load(model, recipe=recipe(name)), given))


@EVERY
def test_state_of_one_sequence_never_leaks_into_the_next(model, name):
    used, fresh = (winnow.load(model, recipe=recipe(name)) for _ in range(2))
    for seed in range(3):
        answer(used, prompt(150, seed + 10))
    alike(answer(used, prompt(120)), answer(fresh, prompt(120)))


@EVERY
def test_chunked_prefill_equals_whole_prefill(model, name):
    if "chunked equals whole" in getattr(recipe(name).generation, "exempt", {}):
        return
    given = prompt(333)
    whole = answer(winnow.load(model, recipe=recipe(name)), given)
    chunked = answer(winnow.load(model, recipe=recipe(name), max_num_batched_tokens=64), given)
    alike(chunked, whole)
    assert chunked.stats.score_entries == whole.stats.score_entries


@EVERY
def test_cached_equals_uncached(model, name):
    """A second request that begins like the first reuses it and answers as if it had not."""
    part = recipe(name)
    behind = part.generation is not None and part.generation.tail is None
    if part.needs.mass == "all" or part.needs.random_queries or behind:
        with pytest.raises(ValueError, match="leave retrieval out"):
            part | recipe("prefix-reuse")
        return
    if part.retrieval is None:
        part = part | recipe("prefix-reuse")
    first, second = prompt(256), prompt(256) + prompt(50, 9)
    llm = winnow.load(model, recipe=part)
    answer(llm, first)
    reused = answer(llm, second)
    found = reused.stats.tokens_reused + reused.stats.tokens_approximate
    # Behind the first block a compression has acted: what comes after it is not reusable.
    block = part.compression.block if part.compression is not None else 0
    assert found >= (block * 2 // 3 or 192)
    assert found + reused.stats.tokens_computed == len(second)
    alike(reused, answer(winnow.load(model, recipe=part), second))


@EVERY
def test_several_turns_in_a_session(model, name):
    llm = winnow.load(model, recipe=recipe(name))
    with llm.session() as session:
        results = [
            session.generate(prompt(n, n), max_new_tokens=4, ignore_eos=True) for n in (200, 30, 1, 70)
        ]
        stored = sum(session.bytes_stored().values())
    assert [len(r.token_ids) for r in results] == [4] * 4
    assert stored > 0
    # A turn computes what it adds and the last token of the answer before it, nothing else.
    assert [r.stats.tokens_computed for r in results[1:]] == [31, 2, 71]


@EVERY
def test_same_seed_same_answer(model, name):
    options = {"temperature": 0.8, "seed": 4, "max_new_tokens": 8}
    a, b = (answer(winnow.load(model, recipe=recipe(name)), prompt(100), **options) for _ in range(2))
    assert a.token_ids == b.token_ids


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_run(model, name):
    result = answer(winnow.load(model, recipe=name), prompt(300))
    assert len(result.token_ids) == 6


# ------------------------------------------------------------- savings, counted apart from the engine


def test_generation_computes_what_its_rule_says(model):
    result = answer(winnow.load(model, recipe=recipe("a-shape")), prompt(200))
    i, j = torch.arange(200)[:, None], torch.arange(200)[None]
    visible = ((j <= i) & ((j < 4) | (i - j < 40))).sum(1)
    # Of the last layer only the last row is read.
    scores = int(visible.sum()) * (LAYERS - 1) + int(visible[-1])
    assert result.stats.score_entries == scores * model.config.num_attention_heads


def test_anchor_attention_computes_less(model):
    sparse = answer(winnow.load(model, recipe=recipe("anchor-attention")), prompt(600)).stats
    full = answer(winnow.load(model), prompt(600)).stats
    assert sparse.score_entries < 0.8 * full.score_entries


def test_compression_reads_and_stores_what_it_keeps(model):
    stats = answer(winnow.load(model, recipe=recipe("snapkv")), prompt(500)).stats
    heads = LAYERS * KV_HEADS
    assert (stats.entries_before, stats.entries_after) == (500 * heads, 40 * heads)
    # Five decode steps after the first token, each reading what was kept and what was appended.
    assert sum(stats.bytes_read.values()) == sum(40 + n for n in range(1, 6)) * heads * ENTRY
    full = answer(winnow.load(model), prompt(500)).stats
    assert sum(stats.bytes_stored.values()) < 0.25 * sum(full.bytes_stored.values())


def test_loading_reads_what_it_selects(model):
    stats = answer(winnow.load(model, recipe=recipe("tidal-decode")), prompt(500)).stats
    # Layers 0, 1 and the selecting layer 2 read everything; 3 and 4 read 24 entries per KV head.
    steps = sum(3 * (500 + n) + 2 * 24 for n in range(1, 6))
    assert sum(stats.bytes_read.values()) == steps * KV_HEADS * ENTRY


def test_reuse_computes_only_the_rest(model):
    llm = winnow.load(model, recipe=recipe("prefix-reuse"))
    answer(llm, prompt(256))
    stats = answer(llm, [*prompt(256), 1, 2, 3]).stats
    assert (stats.tokens_reused, stats.tokens_computed) == (256, 3)


# ------------------------------------------------------------------------------ parts without a method


def demoting(codec: str, **options: Any) -> Recipe:
    act = Demote(codec=codec, **({"recent": 64} | options))
    return Recipe(compression=Compress(score=Recency(), budget=Everything(), act=act))


def spread(a, b) -> float:
    """Largest difference of log-probabilities over what both list, token for token."""
    gaps = [0.0]
    for x, y in zip(a.samples[0].logprobs, b.samples[0].logprobs, strict=True):
        if x["token_id"] != y["token_id"]:
            return math.inf
        gaps.append(abs(x["logprob"] - y["logprob"]))
    return max(gaps)


def test_demoting_to_the_raw_codec_changes_nothing(model):
    given = prompt(500)
    alike(
        answer(winnow.load(model, recipe=demoting("raw", tier="disk")), given),
        answer(winnow.load(model), given),
    )


def test_demoting_to_eight_bits_stores_and_reads_less(model):
    given = prompt(800)
    small, full = (
        answer(winnow.load(model, recipe=r), given, max_new_tokens=4) for r in (demoting("int8"), None)
    )
    # The first token comes from the prefill, which 8 bits do not touch; the others have its noise.
    assert 1e-6 < spread(small, full) < 0.1
    for of in ("bytes_stored", "bytes_read"):
        assert set(getattr(small.stats, of)) == {"host/int8", "host/raw"}
        assert sum(getattr(small.stats, of).values()) < 0.5 * sum(getattr(full.stats, of).values())


@pytest.mark.parametrize(
    "loading", [Tidal(keep=24), Sketch(keep=24, recent=8), Sketch(keep=24, recent=8, every=2)]
)
@pytest.mark.parametrize("front", ["nothing", "dropped", "demoted", "prefix"])
def test_selectors_on_every_kind_of_segment(model, loading, front):
    """Sparse reads over dropped, encoded and shared entries equal those of a fresh engine's second run."""
    base = {
        "nothing": Recipe(),
        "dropped": load("snapkv", keep=100, window=8),
        "demoted": demoting("int8"),
        "prefix": load("prefix-reuse", page=16),
    }[front]
    llm = winnow.load(model, recipe=base | Recipe(loading=loading))
    first = answer(llm, prompt(300))
    again = answer(llm, prompt(300))
    assert first.token_ids == again.token_ids
    assert spread(first, again) < 5e-4
    dense = answer(winnow.load(model, recipe=base), prompt(300)).stats
    entries = {k: v for k, v in again.stats.bytes_read.items() if k != "host/index"}
    assert sum(entries.values()) < 0.9 * sum(dense.bytes_read.values())
    assert ("host/index" in again.stats.bytes_read) == isinstance(loading, Sketch)


def test_sketch_at_its_limit_equals_full_attention(model):
    given = prompt(300)
    limit = Recipe(loading=Sketch(keep=10_000))
    alike(answer(winnow.load(model, recipe=limit), given), answer(winnow.load(model), given))


def test_compression_at_every_turn(model):
    compress = load("snapkv", keep=40, window=8).compression
    part = Recipe(compression=dataclasses.replace(compress, turns="every"))
    with winnow.load(model, recipe=part).session() as session:
        for n in (200, 90, 60):
            result = session.generate(prompt(n, n), max_new_tokens=4, ignore_eos=True)
            assert result.stats.entries_after == 40 * LAYERS * KV_HEADS
