"""Vectors of texts equal those of `transformers`' own hidden states, pooled here by formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import winnow
from tests.models.test_pooling import lay_out, plain
from tests.parity.families import make
from tests.parity.test_general import tokens
from winnow.models.pooling import MODES

LENGTHS = (1, 2, 17, 64, 130)


def states(directory: Path, ids: list[int]) -> torch.Tensor:
    """``[N, K]`` after the final norm, of the model as AutoModel loads it."""
    model = hf.AutoModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("runner", ["fused", "general"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_vectors_equal_transformers(tmp_path: Path, family: str, runner: str, mode: str) -> None:
    make(family).save_pretrained(tmp_path)
    lay_out(tmp_path, mode, normalise=mode == "lasttoken")
    # Small steps: texts are read in chunks, several of them in one step.
    llm = winnow.load(tmp_path, runner=runner, max_num_batched_tokens=40)
    texts = [tokens(length, seed=length).tolist() for length in LENGTHS]
    got = llm.embed(texts)
    for ids, vector in zip(texts, got, strict=True):
        want = plain(mode, states(tmp_path, ids), 0)
        if mode == "lasttoken":
            want = want / want.norm()
        torch.testing.assert_close(vector, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(llm.embed(texts[2]), got[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_windows_and_other_families_too(tmp_path: Path, family: str) -> None:
    make(family).save_pretrained(tmp_path)
    lay_out(tmp_path, "mean", normalise=False)
    ids = tokens(50).tolist()
    got = winnow.load(tmp_path, max_num_batched_tokens=16).embed(ids)
    torch.testing.assert_close(got, plain("mean", states(tmp_path, ids), 0), rtol=1e-4, atol=1e-4)


def test_a_recipe_does_not_touch_vectors_and_nothing_stays(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    lay_out(tmp_path, "mean", config={"is_matryoshka": True})
    full = winnow.load(tmp_path)
    small = winnow.load(tmp_path, recipe="snapkv")
    ids = tokens(200).tolist()
    assert torch.equal(full.embed(ids), small.embed(ids))
    assert not small.engine.busy
    assert small.engine.bytes_held() == 0
    short = full.embed(ids, dimensions=8)
    whole = full.embed(ids)[:8]
    torch.testing.assert_close(short, whole / whole.norm())
