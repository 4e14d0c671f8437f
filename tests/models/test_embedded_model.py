"""The shipped weights answer, several of their heads retrieve, others rest on the first token."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from winnow.models.embedded import evaluate, heads, path

ROOT = Path(__file__).parents[2]


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
    found = evaluate.measure(*loaded, cell, questions=20, turns=10, first_seed=900_000)
    assert found.questions == 20
    assert found.accuracy >= cell.floor - 0.15


def test_heads_divide_the_work(loaded):
    model, tokenizer = loaded
    found = heads.profile(model, tokenizer, tokens=512, seeds=range(700_000, 700_001))
    source, sink, nearby = (torch.tensor(found[name]) for name in ("source", "sink", "nearby"))
    retrieval, local = source > 0.5, nearby > 0.6
    assert retrieval.sum() >= 4
    assert local[0].all()
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
