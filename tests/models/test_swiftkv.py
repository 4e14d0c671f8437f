"""SwiftKV: the short cut equals the training forward, groups hold one set of entries, distillation learns."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.families import VOCAB, make
from torch import Tensor

import winnow
from winnow.engine.request import SamplingParams
from winnow.generation.a_shape import AShape
from winnow.generation.swiftkv import SwiftKV
from winnow.methods import load
from winnow.models import embedded
from winnow.models.embedded import documents
from winnow.models.fused import FusedModel
from winnow.models.hf import HFModel
from winnow.models.swiftkv.__main__ import main
from winnow.models.swiftkv.adapter import FILE, Adapter, start
from winnow.models.swiftkv.data import generated
from winnow.models.swiftkv.distill import Distillation, Plan
from winnow.models.swiftkv.model import SwiftKVModel
from winnow.models.swiftkv.student import Student
from winnow.profiles import save_profile
from winnow.recipe import Recipe
from winnow.types import Profile

# Norms of heads, biases, a rotary factor: what Llama-shaped models differ in. All have four layers.
FAMILIES = ["llama", "qwen2", "qwen3", "yarn"]
FORMS = [(1, 1), (2, 1), (2, 2), (1, 3), (3, 1)]


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def shaken(model: FusedModel, layers: int, group: int) -> Adapter:
    """An adapter that is not the model's own weights, as training would leave it."""
    adapter, dice = start(model, layers, group), torch.Generator().manual_seed(layers * 10 + group)
    tensors = {
        name: x + 0.3 * x.abs().mean() * torch.randn(x.shape, generator=dice)
        for name, x in adapter.tensors.items()
    }
    return Adapter(layers=layers, group=group, tensors=tensors)


def written(tmp_path: Path, model: Any, layers: int, group: int) -> str:
    fused = FusedModel(HFModel(model))
    path = tmp_path / f"{layers}-{group}.safetensors"
    save_profile(shaken(fused, layers, group).profile(fused.fingerprint), path)
    return str(path)


def answer(llm: Any, prompt: Any, **options: Any) -> Any:
    return llm.generate(prompt, **{"max_new_tokens": 6, "ignore_eos": True, "logprobs": VOCAB} | options)


def first_logprobs(result: Any, step: int = 0) -> Tensor:
    out = torch.empty(VOCAB)
    for token, value in result.samples[0].logprobs[step]["top"]:
        out[token] = value
    return out


def trained_forward(model: Any, adapter: Adapter, tokens: list[int]) -> Tensor:
    """``[T, V]`` log-probabilities: all tokens through all layers, as training sees it."""
    ids_BT = torch.tensor([tokens])
    student = Student(model, adapter)
    everywhere = torch.ones_like(ids_BT, dtype=torch.bool)
    logits, _ = student(ids_BT, torch.arange(len(tokens))[None], everywhere)
    return logits.detach().log_softmax(-1)


# ------------------------------------------------------------------ the check list


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_is_the_original_model(family: str) -> None:
    model = make(family)
    same, plain = (
        answer(winnow.load(model, recipe=load("swiftkv", layers=4)), ids(50)),
        answer(winnow.load(model), ids(50)),
    )
    assert same.token_ids == plain.token_ids
    torch.testing.assert_close(first_logprobs(same), first_logprobs(plain), atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layers", "group"), FORMS)
def test_the_short_cut_equals_the_training_forward(
    tmp_path: Path, family: str, layers: int, group: int
) -> None:
    """At the prompt's last position, and at every decoded one."""
    model = make(family)
    fused = FusedModel(HFModel(model))
    recipe = load("swiftkv", layers=layers, group=group, adapter=written(tmp_path, model, layers, group))
    result = answer(winnow.load(model, recipe=recipe), ids(40))
    tokens = ids(40) + result.token_ids
    want = trained_forward(make(family), shaken(fused, layers, group), tokens)
    for step in range(6):
        torch.testing.assert_close(first_logprobs(result, step), want[39 + step], atol=3e-4, rtol=1e-4)
    full = first_logprobs(answer(winnow.load(model), ids(40)))
    assert (full - want[39]).abs().max() > 0.05  # it is another model


@pytest.mark.parametrize(("layers", "group"), FORMS)
def test_a_group_stores_its_entries_once(layers: int, group: int) -> None:
    model = make("llama")
    llm = winnow.load(model, recipe=load("swiftkv", layers=layers, group=group))
    assert isinstance(llm.model, SwiftKVModel)
    held = layers + (4 - layers) // group
    with llm.session() as session:
        stats = session.generate(ids(200), max_new_tokens=3, ignore_eos=True).stats
        store = session._session._sequence.store
        assert store.layers == held
        assert [store.lengths(layer) for layer in range(held)] == [[202, 202]] * held
    plain = answer(winnow.load(model), ids(200), max_new_tokens=3).stats
    assert sum(stats.bytes_stored.values()) * 4 == sum(plain.bytes_stored.values()) * held
    # Layers that share entries still read them, each for itself.
    assert stats.bytes_read == plain.bytes_read


@pytest.mark.parametrize("budget", [7, 64])
def test_chunked_prefill_equals_whole_prefill(tmp_path: Path, budget: int) -> None:
    model = make("llama")
    recipe = load("swiftkv", layers=2, group=2, adapter=written(tmp_path, model, 2, 2))
    whole = answer(winnow.load(model, recipe=recipe), ids(150))
    chunked = answer(winnow.load(model, recipe=recipe, max_num_batched_tokens=budget), ids(150))
    assert chunked.token_ids == whole.token_ids
    torch.testing.assert_close(first_logprobs(chunked, 5), first_logprobs(whole, 5), atol=2e-4, rtol=1e-4)
    assert chunked.stats.score_entries == whole.stats.score_entries


# ------------------------------------------------------------------ what it saves


def test_prompt_tokens_score_in_the_first_layers_only() -> None:
    model, prompt = make("llama"), ids(120)
    stats = answer(winnow.load(model, recipe=load("swiftkv", layers=1, group=3)), prompt).stats
    heads = model.config.num_attention_heads
    assert stats.score_entries == heads * (120 * 121 // 2 + 3 * 120)


def test_prompt_rows_skip_the_later_layers() -> None:
    """Rows that the later layers' MLPs are given, counted through the attention callable."""
    fused = FusedModel(HFModel(make("llama")))
    model, seen = SwiftKVModel(fused, start(fused, 2, 1)), []

    def attend(layer, q, k, v, spec):
        seen.append((layer, len(q), len(k)))
        return torch.zeros_like(q)

    tokens = torch.tensor(ids(9))
    model.forward(tokens, torch.arange(9), torch.tensor([3, 8]), attend)
    assert seen == [(0, 9, 9), (1, 9, 9), (2, 2, 9), (3, 2, 9)]
    seen.clear()
    assert model.forward(tokens, torch.arange(9), torch.arange(0), attend).shape == (0, VOCAB)
    assert seen == [(0, 9, 9), (1, 9, 9), (2, 0, 9), (3, 0, 9)]


# ------------------------------------------------------------------ beside other parts


def test_batches_sessions_forks_and_prefixes(tmp_path: Path) -> None:
    model = make("llama")
    part = load("swiftkv", layers=2, group=2, adapter=written(tmp_path, model, 2, 2))
    llm = winnow.load(model, recipe=part | load("prefix-reuse", page=16), max_num_batched_tokens=48)
    alone = [answer(winnow.load(model, recipe=part), ids(n, n)) for n in (90, 1, 33)]
    together = answer(llm, [ids(n, n) for n in (90, 1, 33)])
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
    again = answer(llm, ids(90, 90))
    assert again.stats.tokens_reused == 80
    assert again.token_ids == alone[0].token_ids
    samples = answer(llm, ids(40), n=3, temperature=1.0, seed=5)
    assert samples.samples[0].token_ids == answer(llm, ids(40), temperature=1.0, seed=5).token_ids
    with llm.session() as session:
        turns = [session.generate(ids(n, n), max_new_tokens=3, ignore_eos=True) for n in (50, 20, 1)]
        session.save(tmp_path / "session")
    flat: list[int] = []
    for n, turn in zip((50, 20, 1), turns, strict=True):
        flat += ids(n, n)
        assert answer(llm, flat, max_new_tokens=3).token_ids == turn.token_ids
        flat += turn.token_ids
    with llm.load_session(tmp_path / "session") as session:
        want = answer(llm, flat + ids(4, 7), max_new_tokens=3).token_ids
        assert session.generate(ids(4, 7), max_new_tokens=3, ignore_eos=True).token_ids == want


def test_compression_and_loading_act_on_the_entries_that_are_held() -> None:
    model = make("llama")
    part = load("swiftkv", layers=2, group=2) | load("snapkv", keep=40, window=8)
    result = answer(winnow.load(model, recipe=part), ids(200))
    assert result.stats.entries_before == 200 * 3 * 2
    assert result.stats.entries_after == 40 * 3 * 2
    wide = load("swiftkv", layers=2, group=2) | load("snapkv", keep=4000) | load("tidal-decode", keep=4000)
    plain = answer(winnow.load(model, recipe=load("swiftkv", layers=2, group=2)), ids(200))
    assert answer(winnow.load(model, recipe=wide), ids(200)).token_ids == plain.token_ids


def test_a_pattern_acts_in_the_first_layers() -> None:
    model, pattern = make("llama"), AShape(init=4, local=16)
    inner = Recipe(generation=SwiftKV(layers=2, pattern=pattern))
    assert Recipe.from_yaml(inner.to_yaml()) == inner
    stats = answer(winnow.load(model, recipe=inner), ids(100)).stats
    i, j = torch.arange(100)[:, None], torch.arange(100)[None]
    visible = int(((j <= i) & ((j < 4) | (i - j < 16))).sum())
    assert stats.score_entries == 6 * (2 * visible + 2 * 100)
    same = answer(winnow.load(model, recipe=Recipe(generation=SwiftKV(layers=4, pattern=pattern))), ids(100))
    assert same.token_ids == answer(winnow.load(model, recipe=Recipe(generation=pattern)), ids(100)).token_ids


# ------------------------------------------------------------------ refusals


def test_refusals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="4 layers; 3 and groups of 2 do not fit"):
        winnow.load(model, recipe=load("swiftkv", layers=3, group=2))
    with pytest.raises(ValueError, match="swiftkv transforms Llama-shaped models"):
        winnow.load(make("gemma2"), recipe=load("swiftkv", layers=2))
    with pytest.raises(ValueError, match="cannot be walked layer by layer"):
        winnow.load(model, recipe=load("swiftkv", layers=2) | load("cacheblend"))
    path = written(tmp_path, model, 2, 2)
    with pytest.raises(ValueError, match=r"adapter .* is for layers=2, group=2"):
        winnow.load(model, recipe=load("swiftkv", layers=2, group=1, adapter=path))
    with pytest.raises(ValueError, match="made for another model"):
        winnow.load(make("llama", seed=1), recipe=load("swiftkv", layers=2, group=2, adapter=path))
    with pytest.raises(ValueError, match="cannot be read"):
        winnow.load(model, recipe=load("swiftkv", layers=2, adapter=str(tmp_path / "none")))
    fused = FusedModel(HFModel(model))
    save_profile(Profile(kind="other", model=fused.fingerprint, tensors={}), tmp_path / "other")
    with pytest.raises(ValueError, match="of kind 'other'"):
        winnow.load(model, recipe=load("swiftkv", layers=2, adapter=str(tmp_path / "other")))
    with caplog.at_level(logging.WARNING):
        winnow.load(model, recipe=load("swiftkv", layers=2))
    assert "runs untrained" in caplog.text


def test_an_adapter_beside_the_weights_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path)
    Path(written(tmp_path, model, 2, 2)).rename(tmp_path / FILE)
    named = winnow.load(tmp_path, recipe=load("swiftkv", layers=2, group=2, adapter=str(tmp_path / FILE)))
    found = winnow.load(tmp_path, recipe=load("swiftkv", layers=2, group=2))
    assert found.model.fingerprint == named.model.fingerprint
    assert answer(found, ids(40)).token_ids == answer(named, ids(40)).token_ids
    assert not caplog.records
    start_of_it = winnow.load(model, recipe=load("swiftkv", layers=2, group=2))
    assert start_of_it.model.fingerprint != found.model.fingerprint
    caplog.clear()
    # One of another form is not taken, and neither is one for the same weights in another dtype.
    winnow.load(tmp_path, recipe=load("swiftkv", layers=2, group=1))
    assert "beside it is for layers=2, group=2" in caplog.text
    caplog.clear()
    winnow.load(tmp_path, recipe=load("swiftkv", layers=2, group=2), dtype=torch.bfloat16)
    assert "made for another model" in caplog.text


def test_an_untransformed_model_is_told_apart() -> None:
    """An engine that was built around `winnow.load` does not compute everything in silence."""
    from winnow.engine.engine import Engine

    engine = Engine(FusedModel(HFModel(make("llama"))), load("swiftkv", layers=2))
    engine.submit(ids(20), SamplingParams(max_new_tokens=1))
    with pytest.raises(ValueError, match="it is not transformed"):
        list(engine.events())


# ------------------------------------------------------------------ distillation


def distillation(directory: Path, steps: int = 120, **options: Any) -> Distillation:
    model = make("llama")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(0.7)  # a teacher whose layers differ less from one another than noise would
    adapter = start(FusedModel(HFModel(model)), 2, 2)
    plan = Plan(steps=steps, **{"rate": 3e-3} | options)
    return Distillation(directory, model, adapter, plan, generated(model, rows=4, tokens=24, seed=3))


def test_distillation_learns_and_trains_nothing_else(tmp_path: Path) -> None:
    run = distillation(tmp_path)
    before = {name: x.clone() for name, x in run._model.state_dict().items()}
    expected = {"norm", "q_2", "q_3", "k_2", "v_2"}
    assert set(dict(run.student.weights.items())) == expected
    assert {name for name, _ in run.student.named_parameters()} == {f"weights.{name}" for name in expected}
    first = run.student.adapter
    run.train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(log) == 120
    early, late = (sum(r["divergence"] for r in part) / 20 for part in (log[:20], log[-20:]))
    assert late < 0.8 * early
    assert all(torch.equal(x, before[name]) for name, x in run._model.state_dict().items())
    for name, x in run.student.adapter.tensors.items():
        assert not torch.equal(x, first.tensors[name]), f"{name} did not learn"


def test_stopped_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    distillation(tmp_path / "one", 6).train()
    distillation(tmp_path / "two", 6).train(until=3)
    resumed = distillation(tmp_path / "two", 6)
    assert resumed.step == 3
    resumed.train()
    a, b = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True)["module"] for x in ("one", "two"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="another training"):
        distillation(tmp_path / "two", 7)


def test_the_command_writes_an_adapter_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("llama").save_pretrained(tmp_path / "model")
    command = ["distill", str(tmp_path / "model"), "--layers", "2", "--group", "2", "--steps", "2"]
    command += ["--rows", "2", "--tokens", "16", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    adapter = str(tmp_path / "out" / "swiftkv.safetensors")
    llm = winnow.load(tmp_path / "model", recipe=load("swiftkv", layers=2, group=2, adapter=adapter))
    assert len(answer(llm, ids(30)).token_ids) == 6
    assert main([*command[:2], "--layers", "3", "--group", "2", "--out", str(tmp_path / "no")]) == 2
    assert "error: the model has 4 layers" in capsys.readouterr().err


# ------------------------------------------------------------------ the embedded model's adapter


def test_the_embedded_model_ships_with_an_adapter(caplog: pytest.LogCaptureFixture) -> None:
    llm = winnow.load("embedded", recipe="swiftkv")
    assert not caplog.records, "it is for other weights, or gone"
    shipped = Adapter.load(str(embedded.path() / FILE), model=llm.model.base.fingerprint)
    assert llm.model.adapter.digest() == shipped.digest()
    assert shipped.form == (llm.model.layers // 2, 1)
    assert sum(file.stat().st_size for file in embedded.path().iterdir()) <= 10_000_000


@pytest.mark.parametrize("task", documents.TASKS)
def test_the_embedded_model_answers_with_half_of_its_layers(task: documents.Task) -> None:
    """Twelve questions; a model that is right in 95 % of all has fewer than nine right once in 400 times."""
    llm, right = winnow.load("embedded", recipe="swiftkv"), 0
    for seed in range(3):
        document = documents.make(task, tokens=1024, seed=950_000 + seed, turns=4, facts=32)
        for turn in range(4):
            reply = llm.generate(documents.prompt(document, turn), max_new_tokens=16).text
            right += documents.score(document.turns[turn], reply.strip().split("\n")[0])
    assert right >= 9
