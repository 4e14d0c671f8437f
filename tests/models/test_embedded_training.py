"""Training: seeds kept apart, batches as described, stopping and resuming change nothing."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from winnow.models.embedded import documents, init, language
from winnow.models.embedded.train import SCHEDULE, Run, Schedule, Stage, batch, training_seed

TINY = Schedule(
    seed=3,
    stages=(
        Stage(steps=2, tokens=96, rows=2, facts=(3, 4), slack=500),
        Stage(steps=2, tokens=160, rows=1, facts=(6, 8), slack=500),
    ),
    horizon=4,
    warmup=2,
)


def test_no_training_seed_is_held_out():
    for seed in (0, 1, 12345):
        for index in (0, 1, SCHEDULE.steps * 1000 + 999):
            assert training_seed(seed, index) not in documents.HELD_OUT


def test_every_training_document_has_a_training_seed(monkeypatch):
    seen = []
    make = documents.make

    def spy(*arguments, seed, **rest):
        seen.append(seed)
        return make(*arguments, seed=seed, **rest)

    monkeypatch.setattr(documents, "make", spy)
    for step in (0, SCHEDULE.steps // 2, SCHEDULE.steps - 1):
        batch(SCHEDULE, step)
    rows = sum(SCHEDULE.stage(step).rows for step in (0, SCHEDULE.steps // 2, SCHEDULE.steps - 1))
    assert len(set(seen)) == len(seen) == rows
    assert not any(seed in documents.HELD_OUT for seed in seen)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_batch_weighs_replies_and_skips_positions(step):
    made = batch(TINY, step)
    pieces = language.vocabulary()
    assert torch.equal(made.ids, batch(TINY, step).ids)
    assert made.ids.shape == made.positions.shape == made.weights.shape
    assert (made.ids[:, 0] == pieces.index(language.BOS)).all()
    assert (made.positions.diff(dim=1) >= 1).all()
    assert (made.positions[:, 0] == 0).all()
    assert (made.weights[:, -1] == 0).all()
    assert (made.weights[made.ids == pieces.index(language.PAD)] == 0).all()
    for row, column in (made.weights == TINY.ending_weight).nonzero().tolist():
        assert pieces[made.ids[row, column + 1]] == "\n"
    assert (made.weights == 1.0).any()


def test_documents_of_every_stage_fit():
    for step in range(0, SCHEDULE.steps, 3):
        assert (batch(SCHEDULE, step).weights == 1.0).sum() >= 2


def test_resuming_is_bit_identical(tmp_path):
    whole = Run(tmp_path / "whole", TINY)
    whole.train()
    Run(tmp_path / "parts", TINY).train(until=2)
    parts = Run(tmp_path / "parts", TINY)
    assert parts.step == 2
    parts.train()
    assert parts.step == whole.step == TINY.steps
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    states = zip(whole.optimizer.state.values(), parts.optimizer.state.values(), strict=True)
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in states)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == TINY.steps


def test_only_what_follows_the_last_attention_learns(tmp_path):
    run = Run(tmp_path, TINY)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.train()
    changed = {name for name, weight in run.model.state_dict().items() if not weight.equal(before[name])}
    last = f"model.layers.{run.model.config.num_hidden_layers - 1}"
    assert changed == {
        f"{last}.post_attention_layernorm.weight",
        f"{last}.mlp.gate_proj.weight",
        f"{last}.mlp.up_proj.weight",
        f"{last}.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_another_schedule_is_refused(tmp_path):
    Run(tmp_path, TINY).save()
    with pytest.raises(ValueError, match="another training"):
        Run(tmp_path, SCHEDULE)


def test_export_is_what_was_trained(tmp_path):
    run = Run(tmp_path / "run", TINY)
    run.train(until=1)
    run.export(tmp_path / "weights")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "weights", dtype=torch.bfloat16)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight.bfloat16(), loaded.state_dict()[name])


def test_rate_rises_and_falls():
    factors = [SCHEDULE.factor(step) for step in range(SCHEDULE.steps)]
    assert max(factors) < 1.0
    assert factors.index(max(factors)) == SCHEDULE.warmup - 1
    assert 0 < factors[-1] < factors[SCHEDULE.warmup]
    assert SCHEDULE.factor(SCHEDULE.horizon) == 0
    with pytest.raises(ValueError, match="ends"):
        SCHEDULE.stage(SCHEDULE.steps)


def test_constructed_start_depends_on_its_seed_alone():
    models = [LlamaForCausalLM(init.config()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        init.construct(model, seed)
    first, same, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    lengths = models[0].model.embed_tokens.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, init.LENGTH))
