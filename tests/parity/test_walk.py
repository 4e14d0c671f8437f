"""Walking the layers one by one equals running them all, and keys turn as the model itself turns them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedModel

from tests.parity.dense import Cache, Packed, step
from tests.parity.families import CONFIGS, make
from tests.parity.test_fused import LLAMA_SHAPED
from tests.parity.test_general import LENGTH, TOLERANCE, tokens
from winnow.models.fused import FusedModel
from winnow.models.hf import HFModel
from winnow.types import LanguageModel, LayerWalk

# Learned positions are part of the hidden states: nothing can move a key.
ABSOLUTE = {"gpt2", "opt"}
# Layers (of four) whose keys know no positions.
WITHOUT_ROPE = {"smollm3": {1, 3}, "cohere2": {1, 3}, "exaone4": {1, 3}}

RUNNERS = [("general", f) for f in sorted(CONFIGS)] + [("fused", f) for f in sorted(LLAMA_SHAPED)]


@pytest.fixture(scope="module", params=RUNNERS, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, LanguageModel]:
    runner, family = request.param
    model = make(family)
    general = HFModel(model)
    return family, model, FusedModel(general) if runner == "fused" else general


def walked(model: LanguageModel, walk: LayerWalk, ids: Tensor, cache: Cache) -> Tensor:
    positions = torch.arange(cache.length, cache.length + len(ids))
    attend, hidden = Packed([cache], [len(ids)]), walk.embed(ids, positions)
    for layer in range(model.layers):
        before = hidden.clone()
        after = walk.layer(layer, hidden, positions, attend)
        assert torch.equal(hidden, before), "a walk leaves its arguments alone"
        hidden = after
    return walk.finish(hidden)


def test_walk_equals_forward(case: tuple[str, PreTrainedModel, LanguageModel]) -> None:
    """In chunks, so that later ones attend to what earlier ones left."""
    _, _, model = case
    ids, cache, walk = tokens(LENGTH), Cache(), model.walk()
    want = step(model, [Cache()], [ids])[0]
    got = torch.cat([walked(model, walk, chunk, cache) for chunk in ids.split([LENGTH - 9, 8, 1])])
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_keys_and_values_are_those_of_the_layer(case: tuple[str, PreTrainedModel, LanguageModel]) -> None:
    _, _, model = case
    ids, walk, positions = tokens(11), model.walk(), torch.arange(3, 14)
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(layer, q, k, v, spec):
        seen.append((k.clone(), v.clone()))
        return torch.zeros_like(q)

    hidden = walk.embed(ids, positions)
    for layer in range(model.layers):
        k, v = walk.keys_values(layer, hidden, positions)
        hidden = walk.layer(layer, hidden, positions, attend)
        torch.testing.assert_close(k, seen[layer][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, seen[layer][1], atol=1e-5, rtol=1e-5)


def test_the_set_of_tokens_may_shrink(case: tuple[str, PreTrainedModel, LanguageModel]) -> None:
    """Rows do not see one another but through attention: a subset gives the same rows."""
    _, _, model = case
    ids, walk, positions = tokens(11), model.walk(), torch.arange(11)

    def own_values(layer, q, k, v, spec):
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    hidden = walk.layer(0, walk.embed(ids, positions), positions, own_values)
    whole = walk.layer(1, hidden, positions, own_values)
    some = torch.tensor([1, 4, 5, 10])
    part = walk.layer(1, hidden[some], positions[some], own_values)
    torch.testing.assert_close(part, whole[some], atol=1e-4, rtol=1e-4)


def keys(model: LanguageModel, ids: Tensor, positions: Tensor) -> list[Tensor]:
    """``[H, N, D]`` of every layer; each token attends to itself alone, so that only positions differ."""
    found: list[Tensor] = []

    def attend(layer, q, k, v, spec):
        found.append(k.transpose(0, 1).clone())
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    model.forward(ids, positions, torch.arange(0), attend)
    return found


def test_turned_keys_are_the_models_own(case: tuple[str, PreTrainedModel, LanguageModel]) -> None:
    """Forward and back, by other steps for each token: what the model computes at the new positions."""
    family, _, model = case
    if family in ABSOLUTE:
        with pytest.raises(ValueError, match=r"carry positions.*use a recipe"):
            model.rotary(0)
        return
    ids, old, new = tokens(6), torch.tensor([0, 1, 5, 9, 30, 60]), torch.tensor([50, 3, 2, 9, 63, 0])
    for layer, (was, wanted) in enumerate(zip(*(keys(model, ids, p) for p in (old, new)), strict=True)):
        rotary = model.rotary(layer)
        assert (rotary is None) == (layer in WITHOUT_ROPE.get(family, ()))
        moved = was if rotary is None else rotary.turn(was, new - old)
        torch.testing.assert_close(moved, wanted, atol=2e-4, rtol=2e-4)


def test_turning_by_nothing_changes_no_bit(case: tuple[str, PreTrainedModel, LanguageModel]) -> None:
    family, _, model = case
    if family in ABSOLUTE:
        return
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, model.head_dim).to(dtype)
        for layer in range(model.layers):
            rotary = model.rotary(layer)
            if rotary is not None:
                assert torch.equal(rotary.turn(x, torch.zeros(5, dtype=torch.long)), x)


def test_yarn_keeps_its_factor_once() -> None:
    """Ten moves change no norm, although the model's cosines carry a factor."""
    model = HFModel(make("yarn"))
    (key,) = (k for k in keys(model, tokens(4), torch.arange(4))[1:2])
    rotary, moved = model.rotary(1), key
    assert rotary is not None
    for _ in range(10):
        moved = rotary.turn(moved, torch.full((4,), 7))
    torch.testing.assert_close(moved.norm(dim=-1), key.norm(dim=-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(moved, rotary.turn(key, torch.full((4,), 70)), atol=1e-4, rtol=1e-4)


def test_partial_rotation_leaves_the_rest_untouched() -> None:
    rotary = HFModel(make("glm4")).rotary(0)
    x = torch.randn(2, 3, 16)
    turned = rotary.turn(x, torch.tensor([1, 2, 3]))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert (turned[..., :8] != x[..., :8]).any()


def test_scores_depend_on_the_distance_alone() -> None:
    rotary = HFModel(make("llama3-rope")).rotary(0)
    q, k = torch.randn(2, 1, 8)
    dots = [
        float(rotary.turn(q, torch.tensor([p + 5])) @ rotary.turn(k, torch.tensor([p])).T)
        for p in (0, 3, -20, 900)
    ]
    assert dots == pytest.approx([dots[0]] * 4, abs=1e-4)


def test_longrope_in_its_long_regime() -> None:
    """The keys of the regime that runs, not those of the other."""
    model = HFModel(make("phi3-longrope"), long_positions=True)
    other = HFModel(make("phi3-longrope"))
    old, new = torch.tensor([2, 40, 7]), torch.tensor([200, 90, 8])
    was, wanted = keys(model, tokens(3), old)[1], keys(model, tokens(3), new)[1]
    torch.testing.assert_close(model.rotary(1).turn(was, new - old), wanted, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(other.rotary(1).turn(was, new - old), wanted, atol=0.05)


class _LongSkip(LlamaModel):
    """Adds its embeddings once more behind the last layer: nothing that a walk could know."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.last_hidden_state = out.last_hidden_state + self.embed_tokens(input_ids)
        return out


class _Peeking(LlamaModel):
    """Looks into its layers from outside."""

    def forward(self, **kwargs):
        assert self.layers[0].mlp.gate_proj.weight is not None
        return super().forward(**kwargs)


@pytest.mark.parametrize(
    ("kind", "reason"), [(_LongSkip, "give other logits"), (_Peeking, "do not run one by one")]
)
def test_models_that_are_more_than_their_layers_are_refused(kind, reason) -> None:
    model = make("llama")
    model.model.__class__ = kind
    runner = HFModel(model)
    with pytest.raises(ValueError, match=f"'llama' is not supported.*{reason}.*use a recipe"):
        runner.walk()


def test_models_without_a_list_of_layers_are_refused() -> None:
    model = make("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    runner = HFModel(model)
    with pytest.raises(ValueError, match="0 lists of 4 attention layers"):
        runner.walk()


def test_a_longrope_model_walks_within_its_regime() -> None:
    """The probe of a walk reaches the last position that is allowed, where frequencies still are constant."""
    for long in (False, True):
        runner = HFModel(make("phi3-longrope"), long_positions=long)
        ids = tokens(20)
        torch.testing.assert_close(
            walked(runner, runner.walk(), ids, Cache()), step(runner, [Cache()], [ids])[0], **TOLERANCE
        )
