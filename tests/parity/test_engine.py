"""``winnow.load(model).generate`` equals ``model.generate``: the whole way, through engine and store."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import winnow
from tests.parity.families import CONFIGS, VOCAB, WINDOW, make
from tests.parity.test_general import tokens
from winnow.kernels.backend import Backend, extension

NEW = WINDOW + 2
LENGTHS = (5 * WINDOW + 3, 1, 2 * WINDOW)
BACKENDS = ("native", "reference") if extension() is not None else ("reference",)


def reference(model: PreTrainedModel, prompt: Tensor) -> tuple[list[int], Tensor]:
    """Greedy tokens of transformers with its dynamic cache, and their log-probabilities ``[NEW, V]``."""
    assert model.config._attn_implementation == "eager"
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        past_key_values=DynamicCache(config=model.config),
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits).float()
    return out.sequences[0, len(prompt) :].tolist(), torch.log_softmax(logits, -1)


# The native kernels take head sizes that are multiples of 16 and say so where they were demanded.
SMALL_HEADS = {
    family
    for family, make_config in CONFIGS.items()
    if (
        getattr(config := make_config(), "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    % 16
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_generate(family: str, backend: Backend) -> None:
    """A ragged batch, prompts cut into chunks that share steps with decoding sequences."""
    if backend == "native" and family in SMALL_HEADS:
        backend = "auto"
    model = make(family)
    prompts = [tokens(length, seed=length) for length in LENGTHS]
    llm = winnow.load(model, backend=backend, max_num_batched_tokens=WINDOW + 3)
    results = llm.generate([p.tolist() for p in prompts], max_new_tokens=NEW, ignore_eos=True, logprobs=VOCAB)
    for prompt, result in zip(prompts, results, strict=True):
        want, want_logprobs = reference(model, prompt)
        assert result.token_ids == want
        got = torch.full((NEW, VOCAB), torch.nan)
        for row, record in enumerate(result.samples[0].logprobs or []):
            for token, logprob in record["top"]:
                got[row, token] = logprob
        torch.testing.assert_close(got, want_logprobs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_turns_of_a_session(family: str) -> None:
    """What a session kept is as good as computing the whole conversation afresh."""
    model = make(family)
    context: list[int] = []
    with winnow.load(model).session() as session:
        for turn, length in enumerate((2 * WINDOW, 3, WINDOW)):
            prompt = tokens(length, seed=turn)
            want, _ = reference(model, torch.cat((torch.tensor(context, dtype=torch.long), prompt)))
            result = session.generate(prompt.tolist(), max_new_tokens=NEW, ignore_eos=True)
            assert result.token_ids == want
            context += [*prompt.tolist(), *want]
