"""H2O against sums over a stored attention matrix."""

from __future__ import annotations

import pytest
import torch

from tests.parity.one_layer import drive, streams
from winnow.methods import load

PROMPT, TOKENS, GROUP = 50, 90, 2


def simulated(q, k, v, *, heavy, recent, every, prompt=PROMPT):
    """The published rule, with lists of tokens and dictionaries of sums."""
    tokens, heads = k.shape[:2]
    scale = q.shape[-1] ** -0.5
    held = [list(range(prompt)) for _ in range(heads)]
    sums = [dict.fromkeys(range(tokens), 0.0) for _ in range(heads)]
    for h in range(heads):
        for n in range(h * GROUP, (h + 1) * GROUP):
            logits = (q[:prompt, n] @ k[:prompt, h].T) * scale
            future = torch.ones(prompt, prompt, dtype=torch.bool).triu(1)
            columns = logits.masked_fill(future, -torch.inf).softmax(-1).sum(0)
            for j in range(prompt):
                sums[h][j] += float(columns[j])
    after, since = [], every
    for t in range(prompt - 1, tokens):
        if t >= prompt:
            for h in range(heads):
                held[h].append(t)
                for n in range(h * GROUP, (h + 1) * GROUP):
                    row = ((k[held[h], h] @ q[t, n]) * scale).softmax(0)
                    for j, p in zip(held[h], row.tolist(), strict=True):
                        sums[h][j] += p
            since += 1
        if since >= every:
            since = 0
            for h in range(heads):
                if len(held[h]) > heavy + recent:
                    old = held[h][:-recent]
                    best = sorted(old, key=lambda j: sums[h][j], reverse=True)[:heavy]
                    held[h] = sorted(best) + held[h][-recent:]
        after.append([list(one) for one in held])
    return after


@pytest.mark.parametrize("every", [1, 5])
def test_keeps_what_the_rule_keeps_at_every_step(every):
    q, k, v = streams(TOKENS)
    steps = drive(load("h2o", heavy=12, recent=8, every=every), q, k, v, prompt=PROMPT)
    expected = simulated(q, k, v, heavy=12, recent=8, every=every)
    assert [step.positions for step in steps] == expected
    held = [len(one) for step in steps for one in step.positions]
    assert max(held) == 20 + every - 1


def test_sums_do_not_depend_on_the_chunks():
    q, k, v = streams(TOKENS)
    recipe = load("h2o", heavy=12, recent=8, every=4)
    whole, chunked = (drive(recipe, q, k, v, prompt=PROMPT, chunk=c) for c in (None, 16))
    assert [step.positions for step in whole] == [step.positions for step in chunked]


def test_a_budget_for_everything_is_full_attention():
    q, k, v = streams(TOKENS)
    steps = drive(load("h2o", heavy=TOKENS, recent=8), q, k, v, prompt=PROMPT)
    n = torch.arange(4)
    logits = torch.einsum("nd,snd->ns", q[-1], k.repeat_interleave(GROUP, 1)[:, n]) * 0.25
    full = torch.einsum("ns,snd->nd", logits.softmax(-1), v.repeat_interleave(GROUP, 1)[:, n])
    torch.testing.assert_close(steps[-1].out, full, atol=1e-5, rtol=0)
