"""Which entries and channels NVIDIA's kvpress takes, on the same weights and the same prompt.

Comparable are its SnapKV, its window with sinks and its ThinK.  Its other presses of methods that are
here are other methods under the same name: AdaKV gives every head a share first and the best scores of all
heads the rest, where paper and official code mix two budgets; H2O's observed attention is divided by how
many queries saw an entry; StreamingLLM's entries keep their positions.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import winnow
from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.methods import load
from winnow.recipe import Recipe

LENGTH, KEPT, WINDOW, SIZE = 200, 100, 32, 64
CONFIG = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": SIZE,
    "tie_word_embeddings": False,
}

# Runs where kvpress is: keys of every layer without a press and with each.
PROGRAM = """
import json, sys, torch, kvpress
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

directory, config = sys.argv[1], json.loads(sys.argv[2])
model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa")).eval()
model.load_state_dict(load_file(directory + "/weights.safetensors"))
ids = load_file(directory + "/prompt.safetensors")["ids"]
presses = {
    "none": None,
    "snapkv": kvpress.SnapKVPress(compression_ratio=0.5, window_size=32, kernel_size=1),
    "window": kvpress.StreamingLLMPress(compression_ratio=0.5, n_sink=4),
    "think": kvpress.ThinKPress(key_channel_compression_ratio=0.4, window_size=32),
}
found = {}
for name, press in presses.items():
    cache = DynamicCache()
    with torch.no_grad():
        if press is None:
            model(ids, past_key_values=cache)
        else:
            with press(model):
                model.model(ids, past_key_values=cache)
    for layer, held in enumerate(cache.layers):
        found[f"{name}/{layer}"] = held.keys[0].clone()
save_file(found, directory + "/keys.safetensors")
"""


@pytest.fixture(scope="module")
def module() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG)).eval()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:  # attention that is sharp enough to tell entries apart
            weight.data *= 12
    return model


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return torch.randint(3, 97, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def theirs(
    module: hf.PreTrainedModel,
    prompt: list[int],
    kvpress_python: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Tensor]:
    """``[H, S, D]`` keys in kvpress's cache by press and layer."""
    directory = tmp_path_factory.mktemp("kvpress")
    save_file(module.state_dict(), directory / "weights.safetensors")
    save_file({"ids": torch.tensor([prompt])}, directory / "prompt.safetensors")
    command = [kvpress_python, "-c", PROGRAM, str(directory), json.dumps(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(Path(directory) / "keys.safetensors")


def held(module: hf.PreTrainedModel, recipe: Recipe, prompt: list[int]) -> list[list[Tensor]]:
    """Per layer and head ``[S, 1 + D]``: positions and keys after the prompt, oldest first."""
    with winnow.load(module, recipe=recipe).session() as session:
        session.generate(prompt, max_new_tokens=1, ignore_eos=True)
        store = session._session._sequence.store
        out = []
        for layer in range(CONFIG["num_hidden_layers"]):
            heads = []
            for head in range(CONFIG["num_key_value_heads"]):
                parts = []
                for segment in store.segments(layer):
                    k_SD = segment.decode().k[head, : segment.lengths[head]]
                    parts.append(torch.cat([segment.positions_of(head)[:, None].float(), k_SD], 1))
                heads.append(torch.cat(parts))
            out.append(heads)
    return out


def positions(full: Tensor, some: Tensor) -> list[int]:
    """Where the rows of ``some`` stand in ``full``; no two keys are alike."""
    return sorted(torch.cdist(some.double(), full.double()).argmin(1).tolist())


@pytest.mark.parametrize("name", ["snapkv", "window"])
def test_the_same_entries_stay(module, prompt, theirs, name):
    recipes = {
        "snapkv": load("snapkv", keep=KEPT, window=WINDOW, kernel=1),
        "window": Recipe(compression=Compress(score=Recency(sinks=4), budget=Uniform(keep=KEPT), act=Drop())),
    }
    ours = held(module, recipes[name], prompt)
    for layer, heads in enumerate(ours):
        for head, entries in enumerate(heads):
            expected = positions(theirs[f"none/{layer}"][head], theirs[f"{name}/{layer}"][head])
            assert len(set(expected)) == KEPT
            assert entries[:, 0].int().tolist() == expected


def test_the_same_channels_go(module, prompt, theirs):
    ours = held(module, load("think", percent=40), prompt)
    for layer, heads in enumerate(ours):
        for head, entries in enumerate(heads):
            gone = (theirs[f"think/{layer}"][head] == 0).all(0)
            assert gone.sum() == SIZE * 40 // 100
            old = entries[:64, 1:]  # whole pages only are thinned
            assert torch.equal((old == 0).all(0), gone)
            torch.testing.assert_close(old, theirs[f"think/{layer}"][head][:64], atol=1e-4, rtol=1e-4)
