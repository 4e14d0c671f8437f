"""Rows of a prompt that nobody reads stop before the last layer; nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import winnow
from tests.engine.conftest import prompt
from winnow.generation.anchor import Anchor
from winnow.methods import load as recipe_named
from winnow.models.fused import FusedModel
from winnow.models.hf import HFModel
from winnow.recipe import Recipe


class Watching:
    """A model that writes down how many queries its last layer gives in each step."""

    def __init__(self, model):
        self._model = model
        self.steps: list[int] = []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def forward(self, token_ids, position_ids, rows, attend, read=None):
        def seen(layer, q_NHD, *rest):
            if layer == self.layers - 1:
                self.steps.append(len(q_NHD))
            return attend(layer, q_NHD, *rest)

        return self._model.forward(token_ids, position_ids, rows, seen, read)


def steps(module, recipe, tokens, chunk, turns=1):
    """Queries of the last layer in each step of prompts of ``tokens``, with one token each to draw."""
    llm = winnow.load(module, recipe=recipe, max_num_batched_tokens=chunk)
    watching = llm.engine.model = Watching(llm.engine.model)
    with llm.session() as session:
        for turn in range(turns):
            session.generate(prompt(tokens, turn), max_new_tokens=1, ignore_eos=True)
    return watching.steps


def test_only_the_row_that_is_drawn_from_passes(module):
    assert steps(module, Recipe(), 100, 40) == [0, 0, 1]
    assert steps(module, recipe_named("a-shape", init=4, local=8), 100, 40) == [0, 0, 1]
    # The second turn begins with the token that was drawn.
    assert steps(module, Recipe(), 40, 40, turns=2) == [1, 0, 1]


def test_what_a_compression_looks_at_passes(module):
    """Also where its window begins in an earlier chunk than the last, and only in turns in which it acts."""
    snapkv = recipe_named("snapkv", keep=30, window=8)
    assert steps(module, snapkv, 83, 40) == [0, 5, 3]
    assert steps(module, snapkv, 39, 40, turns=2) == [8, 1]
    assert steps(module, recipe_named("h2o", heavy=10, recent=10), 90, 40) == [40, 40, 10]
    blocks = Recipe(compression=replace(snapkv.compression, block=30))
    assert steps(module, blocks, 60, 40) == [30, 30]
    assert steps(module, recipe_named("streaming-llm", sinks=4, recent=16, block=30), 60, 40) == [0, 1]


def test_what_a_pattern_is_computed_from_passes(module):
    anchor = Recipe(generation=Anchor(block=4, step=4, init=4))
    assert steps(module, anchor, 100, 48) == [0, 0, 4]
    assert steps(module, anchor, 95, 48) == [0, 15]
    assert steps(module, recipe_named("pbs-attn", block=8, segment=16), 40, 48) == [40]


@pytest.mark.parametrize("runs", [1, 5])
def test_every_row_of_a_decode_step_passes(module, runs):
    llm = winnow.load(module, recipe=Recipe())
    watching = llm.engine.model = Watching(llm.engine.model)
    llm.generate([prompt(20, i) for i in range(runs)], max_new_tokens=3, ignore_eos=True)
    assert watching.steps == [runs] * 3


@pytest.mark.parametrize("read", [[], [16], [3, 4, 9, 16], list(range(17))])
def test_narrow_equals_wide(module, read):
    model = FusedModel(HFModel(module))
    rows = torch.tensor(read[1:], dtype=torch.long)
    seen = {}

    def attend_as(which):
        def attend(layer, q_NHD, k_NHD, v_NHD, spec):
            seen[which, layer] = q_NHD.clone(), k_NHD.clone(), v_NHD.clone()
            return q_NHD.flip(2) + len(k_NHD)  # of its own row alone

        return attend

    tokens, at = torch.tensor(prompt(17)), torch.arange(17)
    wide = model.forward(tokens, at, rows, attend_as("wide"))
    narrow = model.forward(tokens, at, rows, attend_as("narrow"), torch.tensor(read, dtype=torch.long))
    torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-5)
    for layer in range(model.layers):
        for a, b in zip(seen["wide", layer][1:], seen["narrow", layer][1:], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    last = model.layers - 1
    torch.testing.assert_close(seen["narrow", last][0], seen["wide", last][0][read], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [40, 4096])
@pytest.mark.parametrize(
    "recipe",
    [
        recipe_named("snapkv", keep=30, window=8),
        recipe_named("h2o", heavy=20, recent=20),
        recipe_named("tri-shape", init=4, local=16, last=12) | recipe_named("snapkv", keep=30, window=8),
        Recipe(generation=Anchor(block=4, step=4, init=4)) | recipe_named("snapkv", keep=30, window=8),
    ],
    ids=["snapkv", "h2o", "tri-shape", "anchor"],
)
def test_the_runner_that_lets_all_rows_pass_keeps_the_same_entries(module, recipe, chunk):
    kept, tokens = [], []
    for runner in ("general", "fused"):
        llm = winnow.load(module, recipe=recipe, runner=runner, max_num_batched_tokens=chunk)
        with llm.session() as session:
            tokens.append(session.generate(prompt(123), max_new_tokens=5, ignore_eos=True).token_ids)
            store = session._session._sequence.store
            kept.append(
                [
                    [segment.positions_of(h).tolist() for h in range(segment.heads)]
                    for layer in range(store.layers)
                    for segment in store.segments(layer)
                ]
            )
    assert kept[0] == kept[1]
    assert tokens[0] == tokens[1]
