"""The shipped weights answer, several of their heads retrieve, others rest on the first token."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from winnow.models.embedded import documents, evaluate, heads, path

ROOT = Path(__file__).parents[2]
#: noise on the weights that choose a token, so that most answers are wrong, but not all
DAMAGE = 0.1


@pytest.fixture(scope="module")
def loaded():
    model = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(path())


def test_shape_is_the_promised_one(loaded):
    model, tokenizer = loaded
    config = model.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 4
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert (path() / "model.safetensors").stat().st_size <= 10_000_000
    assert len(tokenizer) == config.vocab_size
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids("\n")


@pytest.mark.parametrize("cell", evaluate.cells([1024]), ids=lambda cell: cell.name)
def test_small_cells_are_answered(loaded, cell):
    """20 questions: a model at its floor falls below floor - 0.15 in fewer than 1 of 100 such samples."""
    turns = min(10, cell.turns)
    found = evaluate.measure(*loaded, cell, questions=20, turns=turns, first_seed=900_000)
    assert found.questions >= 20
    assert found.accuracy >= cell.floor - 0.15


def test_reading_ahead_is_free_generation():
    """With a damaged model, which is sometimes wrong, every answer is the one that `generate` writes."""
    model = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path())
    noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.lm_head.weight += DAMAGE * noise
    (cell,) = evaluate.cells([1024], ["mixture of four"])
    cell = replace(cell, tokens=600, facts=24)
    found = evaluate.measure(model, tokenizer, cell, questions=8, turns=8, first_seed=900_000)
    document = documents.make(cell.task, tokens=600, seed=900_000, turns=8, facts=24)
    replies: list[str] = []
    for turn in range(8):
        ids = tokenizer(documents.prompt(document, turn, replies), return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        replies.append(tokenizer.decode(out).strip().split("\n")[0])
    right = [documents.score(turn, reply) for turn, reply in zip(document.turns, replies, strict=True)]
    assert 0 < sum(right) < 8
    assert (found.right, found.first[0]) == (sum(right), right[0])


def test_heads_divide_the_work(loaded):
    model, tokenizer = loaded
    found = heads.profile(model, tokenizer, tokens=512, seeds=range(700_000, 700_001))
    source, sink, nearby = (torch.tensor(found[name]) for name in ("source", "sink", "nearby"))
    retrieval, local = source > 0.5, nearby > 0.6
    assert retrieval.sum() >= 4
    # the fourth finds headings, and rests where there are none
    assert local[0, :3].all()
    assert sink[0, 3] > 0.5
    assert local[1:].sum() >= 3
    assert not (retrieval & local).any()
    assert (sink > 0.5).sum() >= 8
    # a retrieval head rests on the first token where it has nothing to retrieve
    assert (sink[retrieval] > 0.5).sum() >= 2
    assert torch.equal(retrieval.any(1).nonzero().flatten(), torch.arange(1, 6))


def test_record_of_the_evaluation_is_of_these_weights():
    record = json.loads((ROOT / "benchmarks/results/embedded-model.json").read_text())
    digest = hashlib.sha256((path() / "model.safetensors").read_bytes()).hexdigest()
    assert record["weights_sha256"] == digest
    assert {(cell["name"], cell["tokens"]) for cell in record["cells"]} == {
        (cell.name, cell.tokens) for cell in evaluate.cells()
    }
    for cell in record["cells"]:
        assert cell["questions"] >= 300
        assert cell["reached"] == (cell["right"] / cell["questions"] >= cell["floor"])
    assert evaluate.table(record) in (ROOT / "docs/embedded-model.md").read_text()
