"""What the general runner promises beyond parity: the user's model is left alone, nothing dense is built."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from tests.parity.dense import Cache, Packed, step
from tests.parity.families import VOCAB, WINDOW, make
from tests.parity.test_general import LENGTH, expected, tokens
from torch import Tensor
from transformers import LlamaConfig

from winnow.models.hf import HFModel
from winnow.models.interface import NAME
from winnow.models.rotary import position_limit
from winnow.types import AttentionSpec, LanguageModel


def test_attributes_satisfy_the_protocol() -> None:
    model = make("gpt-oss")
    runner = HFModel(model, name="mine")
    as_protocol: LanguageModel = runner
    assert (as_protocol.name, as_protocol.layers, as_protocol.kv_heads) == ("mine", 4, 2)
    assert (runner.query_heads, runner.head_dim, runner.vocab_size) == (6, 16, VOCAB)
    assert [spec.window for spec in runner.specs] == [WINDOW, None, WINDOW, None]
    assert all(
        torch.equal(spec.sinks, layer.self_attn.sinks)
        for spec, layer in zip(runner.specs, model.model.layers, strict=True)
    )
    assert runner.eos_token_ids == ()


def test_the_users_model_is_left_as_it_was() -> None:
    model = make("gemma2").train()
    parameters = dict(model.named_parameters())
    ids = tokens(LENGTH)
    before = copy.deepcopy(model.config.to_dict())
    runner = HFModel(model)
    step(runner, [Cache()], [ids])
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert not runner.module.training
    for name, parameter in runner.module.named_parameters():
        assert parameter is parameters[name]
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    assert torch.isfinite(expected(model, ids)).all()


def test_both_run_at_once() -> None:
    """The user's model in one thread, ours in another: neither sees the other's attention."""
    model = make("mistral")
    ids = tokens(LENGTH)
    want, runner = expected(model, ids), HFModel(model)
    theirs: list[Tensor] = []
    thread = threading.Thread(target=lambda: theirs.extend(expected(model, ids) for _ in range(20)))
    thread.start()
    ours = [step(runner, [Cache()], [ids])[0] for _ in range(5)]
    thread.join()
    for logits in (*theirs, *ours):
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


def test_no_dense_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of 20,000 tokens would be 400 MB; ours never exists."""
    runner = HFModel(make("gemma3"))
    masks: list[object] = []
    inner = runner.module.model.layers[0].self_attn
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )

    def nothing(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        return q

    n = 20_000
    ids = torch.zeros(n, dtype=torch.long)
    runner.forward(ids, torch.arange(n) % 100, torch.tensor([n - 1]), nothing)
    assert masks == [None]


def test_a_padding_mask_is_refused_not_lost() -> None:
    twin = HFModel(make("llama")).module
    ids = tokens(6)[None]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding"):
        twin(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="runs only through it"):
        twin(ids, use_cache=False)


def test_attend_failing_leaves_no_trace() -> None:
    runner = HFModel(make("llama"))
    ids = tokens(9)

    def broken(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.forward(ids, torch.arange(9), torch.tensor([8]), broken)
    assert step(runner, [Cache()], [ids])[0].isfinite().all()


def test_queries_arrive_in_the_form_that_kernels_take() -> None:
    runner = HFModel(make("gpt2"))
    seen: list[int] = []

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        assert q.shape == (5, 6, 8)
        assert k.shape == v.shape == (5, 6, 8)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert spec.scale == pytest.approx(8**-0.5 / (layer + 1))
        seen.append(layer)
        return q

    runner.forward(tokens(5), torch.arange(5), torch.tensor([4]), look)
    assert seen == [0, 1, 2]


def test_fingerprint_follows_every_weight_and_the_configuration() -> None:
    model = make("llama")
    first = HFModel(model).fingerprint
    assert HFModel(make("llama")).fingerprint == first
    assert HFModel(model.set_attn_implementation("sdpa") or model).fingerprint == first
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[7, 5] += 1e-3
    assert HFModel(model).fingerprint != first
    other = make("llama")
    other.config.rms_norm_eps = 1e-3
    assert HFModel(other).fingerprint != first


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_are_refused(value: float) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = value
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight contains NaN or infinity"):
        HFModel(model)


def test_weights_without_data_are_refused() -> None:
    with pytest.raises(ValueError, match="has no data"):
        HFModel(make("llama").to("meta"))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_stay_in_one_rotary_regime(kind: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    config = LlamaConfig(
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            **factors,
        },
    )
    assert position_limit(config) == {"dynamic": 256, "longrope": 64}[kind]
    assert position_limit(LlamaConfig(max_position_embeddings=256)) == 256


def test_a_twin_name_is_safe_for_transformers() -> None:
    assert not any(word in NAME for word in ("flash", "sdpa", "flex_attention", "eager", "|"))


def test_packed_sequences_do_not_influence_each_other() -> None:
    runner = HFModel(make("llama"))
    one, two = tokens(9, seed=1), tokens(30, seed=2)
    alone = step(runner, [Cache()], [one])[0]
    together = step(runner, [Cache(), Cache()], [one, two])[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    ids, positions = torch.cat((one, two)), torch.cat((torch.arange(9), torch.arange(30)))
    logits = runner.forward(ids, positions, torch.tensor([8]), Packed([Cache(), Cache()], [9, 30]))
    torch.testing.assert_close(logits[0], alone[8], atol=1e-5, rtol=1e-5)
