"""Loading by name, from a directory and from memory; every damage has its message."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import pytest
import torch
import transformers as hf
from tests.models.test_hf_text import byte_level
from tests.parity.dense import greedy
from tests.parity.families import make
from tests.parity.test_general import tokens

from winnow.models.fused import FusedModel
from winnow.models.hf import HFModel
from winnow.models.load import load_model
from winnow.models.random import random_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_directory(directory: Path) -> None:
    model, text = load_model(directory)
    assert isinstance(model, FusedModel)
    assert model.dtype is torch.bfloat16
    assert model.name == str(directory)
    assert text is None
    byte_level().save_pretrained(directory)
    again, text = load_model(str(directory), dtype=torch.float32, runner="general")
    assert isinstance(again, HFModel)
    assert again.dtype is torch.float32
    assert text is not None
    assert text.encode("ab", special=False) == [64, 65]


@pytest.mark.usefixtures("no_network")
def test_memory_equals_directory(directory: Path) -> None:
    saved, _ = load_model(directory)
    model = hf.AutoModelForCausalLM.from_pretrained(directory)
    held, _ = load_model(model)
    assert held.fingerprint == saved.fingerprint
    prompt = tokens(12)
    assert greedy(held, prompt, 6) == greedy(saved, prompt, 6)


def test_a_fused_model_can_still_be_saved(tmp_path: Path) -> None:
    model = make("llama")
    runner, _ = load_model(model, runner="fused")
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert HFModel(again).fingerprint == runner.fingerprint
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.1 * 4 * sum(p.numel() for p in model.parameters())


def test_runner_choice(caplog: pytest.LogCaptureFixture) -> None:
    model = make("gemma2")
    with caplog.at_level(logging.INFO, logger="winnow.models"):
        runner, _ = load_model(model)
    assert isinstance(runner, HFModel)
    assert "runs on the general runner" in caplog.text
    with pytest.raises(ValueError, match="Llama-shaped models only"):
        load_model(model, runner="fused")
    with pytest.raises(ValueError, match="unknown runner 'fast'; choose auto, general, fused"):
        load_model(model, runner="fast")  # type: ignore[arg-type]


def test_a_model_that_only_looks_like_llama_is_not_admitted() -> None:
    """SmolLM3 has Llama's modules and skips rotation in some layers: only its logits tell."""
    with pytest.raises(ValueError, match="fused logits differ by"):
        load_model(make("smollm3"), runner="fused")
    with pytest.raises(ValueError, match="fused logits differ by"):
        load_model(make("smollm3", dtype=torch.bfloat16), runner="fused")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embeded", "did you mean 'embedded'"),
        ("gpt5", "owner/name"),
        ("./missing", "no directory"),
        ("~/missing", "no directory"),
        ("/some/where/else", "no directory"),
        ("", "owner/name"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(name)
    assert "\n" not in str(refusal.value)


def test_directory_without_configuration(directory: Path) -> None:
    (directory / "config.json").unlink()
    _refused(directory, "no config.json")


def test_directory_without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    _refused(directory, "no weights")


def test_broken_configuration(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    _refused(directory, "cannot read the configuration")


def test_unknown_architecture(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "lama"}))
    _refused(directory, "cannot read the configuration")


def test_truncated_weights(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _refused(directory, "cannot read the weights")


def test_missing_weights_are_not_made_up(directory: Path) -> None:
    model = make("llama")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(directory, state_dict=state)
    _refused(directory, r"lacks 1 weights, the first is model\.layers\.1\.mlp\.up_proj\.weight")


def test_weights_of_another_shape(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    _refused(directory, "cannot read the weights")


def test_nan_in_the_weights(directory: Path) -> None:
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[1, 1] = torch.nan
    model.save_pretrained(directory)
    _refused(directory, r"lm_head\.weight contains NaN")


def test_refused_before_its_weights_are_read(directory: Path) -> None:
    hf.T5Config().save_pretrained(directory)
    _refused(directory, "encoder-decoder")


def _refused(directory: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(directory)
    assert "\n" not in str(refusal.value)


def test_memory_is_neither_moved_nor_converted() -> None:
    model = make("llama")
    with pytest.raises(ValueError, match=r"model\.to\(torch\.bfloat16\)"):
        load_model(model, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="move it yourself"):
        load_model(model, device="cuda")
    with pytest.raises(ValueError, match="cannot load a list"):
        load_model([1])  # type: ignore[arg-type]


def test_random_models() -> None:
    one, same, other = (random_model("tiny", seed=seed) for seed in (0, 0, 1))
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (one, same, other)]
    assert weights[0].dtype is torch.bfloat16
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert abs(float(weights[0].detach().float().mean())) < 1e-3
    assert 0.015 < float(weights[0].detach().float().std()) < 0.025
    runner, _ = load_model(one)
    assert isinstance(runner, FusedModel)
    assert runner.eos_token_ids == ()
    with pytest.raises(ValueError, match="unknown preset"):
        random_model("70b")
