"""The fused runner equals `transformers`, and takes exactly the models that it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.dense import Cache, greedy, step
from tests.parity.families import CONFIGS, make
from tests.parity.test_general import LENGTH, TOLERANCE, expected, tokens
from winnow.models.fused import FusedModel
from winnow.models.hf import HFModel

LLAMA_SHAPED = {
    "linear-rope",
    "llama",
    "llama3-rope",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "yarn",
}


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_prefill_and_decode(family: str) -> None:
    """A long chunk (matrix products), a short one and single tokens (matrix-vector products)."""
    model = make(family)
    ids = tokens(LENGTH)
    want = expected(model, ids)
    runner, cache = FusedModel(HFModel(model)), Cache()
    chunks = ids.split([LENGTH - 9, 6, 1, 1, 1])
    got = torch.cat([step(runner, [cache], [chunk])[0] for chunk in chunks])
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert greedy(runner, ids[:9], 12) == greedy(runner.general, ids[:9], 12)


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_joined_weights_are_the_models_own(family: str) -> None:
    """The model still works, nothing is held twice, and training it is seen."""
    model = make(family)
    ids = tokens(LENGTH)
    before = expected(model, ids)
    runner = FusedModel(HFModel(model))
    torch.testing.assert_close(expected(model, ids), before, atol=0, rtol=0)
    attention = model.model.layers[0].self_attn
    joined = runner.stack.layers[0].qkv.weight
    assert attention.k_proj.weight.data_ptr() == joined[attention.q_proj.out_features].data_ptr()
    with torch.no_grad():
        attention.k_proj.weight.mul_(-1)
    changed = expected(model, ids)
    assert not torch.allclose(changed, before, atol=0.01)
    torch.testing.assert_close(step(runner, [Cache()], [ids])[0], changed, **TOLERANCE)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - LLAMA_SHAPED))
def test_other_shapes_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="use runner='general'"):
        FusedModel(HFModel(make(family)))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16(family: str) -> None:
    """In half precision both runners lie equally far from the same model in float32."""
    exact, rounded = make(family), make(family, dtype=torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    ids = tokens(LENGTH)
    want = expected(exact, ids)

    def distance(logits: Tensor) -> float:
        return float((logits - want).square().mean().sqrt() / want.square().mean().sqrt())

    general = HFModel(rounded)
    fused = distance(step(FusedModel(general), [Cache()], [ids])[0])
    assert fused < 1.2 * distance(step(general, [Cache()], [ids])[0])
