"""StreamingLLM against keys without rotation that are turned by their index in the cache."""

from __future__ import annotations

import pytest
import torch

from tests.parity.one_layer import HalfSplit, drive, streams
from winnow.methods import load

GROUP, SINKS, RECENT, PROMPT, TOKENS = 2, 4, 20, 40, 120


def rotated(x, positions):
    return HalfSplit().turn(x.transpose(0, 1), positions).transpose(0, 1)


def published(q, k, v, *, every):
    """Attention of every decoded token over a cache of unrotated keys; index in the cache is position."""
    heads = k.shape[1]
    cache = list(range(PROMPT))[:SINKS] + list(range(PROMPT))[-RECENT:]
    outs, since = [], 0
    for t in range(PROMPT, TOKENS):
        cache.append(t)
        index = torch.arange(len(cache))
        out = []
        for n in range(heads * GROUP):
            h = n // GROUP
            keys = HalfSplit().turn(k[cache, h], index)
            query = HalfSplit().turn(q[t, n][None], index[-1:])[0]
            out.append(((keys @ query) * q.shape[-1] ** -0.5).softmax(0) @ v[cache, h])
        outs.append(torch.stack(out))
        since += 1
        if since == every:
            since = 0
            cache = cache[:SINKS] + cache[SINKS:][-RECENT:]
    return outs


@pytest.mark.parametrize("every", [1, 6])
def test_equals_rotation_by_cache_index(every):
    q, k, v = streams(TOKENS, seed=3)
    at = torch.arange(TOKENS)
    recipe = load("streaming-llm", sinks=SINKS, recent=RECENT, every=every)
    steps = drive(recipe, rotated(q, at), rotated(k, at), v, prompt=PROMPT)
    for step, expected in zip(steps[1:], published(q, k, v, every=every), strict=True):
        torch.testing.assert_close(step.out, expected, atol=2e-5, rtol=0)
    # Positions of what is held are consecutive: the sinks lie right before the window.
    assert steps[-1].positions[0] == list(range(TOKENS - len(steps[-1].positions[0]), TOKENS))


def test_the_cache_is_bounded_in_the_prompt_too():
    q, k, v = streams(TOKENS)
    recipe = load("streaming-llm", sinks=SINKS, recent=RECENT, every=8, block=10)
    steps = drive(recipe, q, k, v, prompt=100, chunk=10)
    assert max(len(step.positions[0]) for step in steps) <= SINKS + RECENT + 8


def test_without_sinks_the_window_remains():
    q, k, v = streams(TOKENS)
    steps = drive(load("streaming-llm", sinks=0, recent=RECENT, every=1), q, k, v, prompt=PROMPT)
    assert steps[-1].positions[0] == list(range(TOKENS - RECENT, TOKENS))
    torch.testing.assert_close(steps[-1].k[0], k[-RECENT:, 0])
