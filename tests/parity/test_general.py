"""The general runner equals `transformers` with eager attention and its dynamic cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.parity.dense import Cache, greedy, step
from tests.parity.families import CONFIGS, VOCAB, WINDOW, make
from winnow.models.hf import HFModel

LENGTH = 5 * WINDOW + 3
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# Families with a mechanism that a dense attention without window, soft cap and sinks gets wrong.
SPECIAL = {
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "mistral",
    "mixtral",
    "olmo3",
    "phi3",
    "qwen2-window",
    "smollm3",
    "starcoder2",
}


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def expected(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """``[T, V]`` logits of transformers, which must attend eagerly (its own attention is the oracle)."""
    assert model.config._attn_implementation == "eager"
    return model(ids[None], past_key_values=DynamicCache(config=model.config)).logits[0]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def pair(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, HFModel]:
    model = make(request.param)
    return request.param, model, HFModel(model)


def test_whole_prefill(pair: tuple[str, PreTrainedModel, HFModel]) -> None:
    _, model, runner = pair
    ids = tokens(LENGTH)
    torch.testing.assert_close(step(runner, [Cache()], [ids])[0], expected(model, ids), **TOLERANCE)


def test_chunked_prefill(pair: tuple[str, PreTrainedModel, HFModel]) -> None:
    _, model, runner = pair
    ids, cache = tokens(LENGTH), Cache()
    got = torch.cat(
        [step(runner, [cache], [chunk])[0] for chunk in ids.split([5, 1, 2 * WINDOW, LENGTH - 22])]
    )
    torch.testing.assert_close(got, expected(model, ids), **TOLERANCE)


def test_packed_ragged_steps(pair: tuple[str, PreTrainedModel, HFModel]) -> None:
    """Three sequences of unequal length share each step: prefill chunks beside decode rows."""
    _, model, runner = pair
    all_ids = [tokens(n, seed) for seed, n in enumerate((LENGTH, 7, 2 * WINDOW + 1))]
    plan = [(4, 6, 0), (LENGTH - 4 - 2, 1, 2 * WINDOW), (1, 0, 1), (1, 0, 0)]
    caches, got, at = [Cache() for _ in all_ids], [[] for _ in all_ids], [0, 0, 0]
    for lengths in plan:
        active = [i for i, n in enumerate(lengths) if n]
        chunks = [all_ids[i][at[i] : at[i] + lengths[i]] for i in active]
        logits = step(runner, [caches[i] for i in active], chunks)
        for i, part in zip(active, logits, strict=True):
            got[i].append(part)
            at[i] += len(part)
    for ids, parts in zip(all_ids, got, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected(model, ids), **TOLERANCE)


def test_greedy_tokens(pair: tuple[str, PreTrainedModel, HFModel]) -> None:
    _, model, runner = pair
    prompt, new = tokens(2 * WINDOW), 2 * WINDOW
    reference = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        past_key_values=DynamicCache(config=model.config),
    )
    assert greedy(runner, prompt, new) == reference[0, len(prompt) :].tolist()


def test_mechanism_is_not_idle(pair: tuple[str, PreTrainedModel, HFModel]) -> None:
    """Without window, soft cap and sinks the special families fail, so the tests above see them."""
    family, model, runner = pair
    ids = tokens(LENGTH)
    error = (step(runner, [Cache()], [ids], blind=True)[0] - expected(model, ids)).abs().max()
    assert (error > 0.01) == (family in SPECIAL)


def test_longrope_beyond_its_first_regime() -> None:
    """With the long frequencies throughout, long prompts equal transformers, chunked ones too."""
    model = make("phi3-longrope")
    short, long = HFModel(model), HFModel(model, long_positions=True)
    assert (short.max_length, long.max_length) == (64, 256)
    assert short.fingerprint != long.fingerprint
    ids, cache = tokens(90), Cache()
    want = expected(model, ids)
    got = torch.cat([step(long, [cache], [chunk])[0] for chunk in ids.split([20, 1, 40, 29])])
    torch.testing.assert_close(got, want, **TOLERANCE)
    torch.testing.assert_close(expected(model, ids), want, **TOLERANCE)  # the user's buffers are theirs
    with pytest.raises(ValueError, match="longrope"):
        HFModel(make("llama"), long_positions=True)


def test_only_asked_rows_get_logits(pair: tuple[str, PreTrainedModel, HFModel]) -> None:
    _, _, runner = pair
    ids, positions = tokens(9), torch.arange(9)
    from tests.parity.dense import Packed

    def run(rows: list[int]) -> Tensor:
        index = torch.tensor(rows, dtype=torch.long)
        return runner.forward(ids, positions, index, Packed([Cache()], [9]))

    whole = run(list(range(9)))
    torch.testing.assert_close(run([7, 2]), whole[[7, 2]], atol=1e-5, rtol=1e-5)
    assert run([]).shape == (0, VOCAB)
    assert whole.dtype == torch.float32
