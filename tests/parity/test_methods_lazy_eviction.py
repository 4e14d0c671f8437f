"""LazyEviction against a scan of stored attention rows."""

from __future__ import annotations

import math

import torch

from tests.parity.one_layer import drive, streams
from winnow.compression.scorers.recurrence import Recurrence
from winnow.methods import load
from winnow.types import AttentionSpec, Glimpse, Observation, Segment

GROUP, PROMPT, TOKENS, ALPHA = 2, 24, 90, 0.05


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def simulated(q, k, *, keep, window):
    """Time stamps and pauses token by token, in dictionaries."""
    heads = k.shape[1]
    held = [list(range(PROMPT)) for _ in range(heads)]
    stamp = [dict.fromkeys(range(PROMPT), PROMPT - 1) for _ in range(heads)]
    pause = [dict.fromkeys(range(PROMPT), 0) for _ in range(heads)]
    after, since = [[list(one) for one in held]], 0
    for t in range(PROMPT, TOKENS):
        for h in range(heads):
            held[h].append(t)
            stamp[h][t], pause[h][t] = t - 1, 0
            rows = [
                ((k[held[h], h] @ q[t, n]) * q.shape[-1] ** -0.5).softmax(0)
                for n in range(h * GROUP, (h + 1) * GROUP)
            ]
            share = sum(rows) / GROUP
            for j, a in zip(held[h], share.tolist(), strict=True):
                new = t if a >= ALPHA else stamp[h][j]
                pause[h][j] = max(pause[h][j], new - stamp[h][j])
                stamp[h][j] = new
        since += 1
        if since == window:
            since = 0
            for h in range(heads):
                if len(held[h]) > keep:

                    def worth(j, h=h, t=t):
                        first = 2 * sigmoid(-1 - (t - stamp[h][j]) / (pause[h][j] + 1e-5))
                        return (first + (2 * sigmoid(1 - pause[h][j]) if pause[h][j] > 0 else 0.0), j)

                    old = sorted(held[h][:-window], key=worth, reverse=True)[: keep - window]
                    held[h] = sorted(old) + held[h][-window:]
        after.append([list(one) for one in held])
    return after


def test_keeps_what_recurs():
    q, k, v = streams(TOKENS, seed=5)
    steps = drive(load("lazy-eviction", keep=30, window=6, alpha=ALPHA), q, k, v, prompt=PROMPT)
    assert [step.positions for step in steps] == simulated(q, k, keep=30, window=6)
    sizes = [len(step.positions[0]) for step in steps]
    assert max(sizes) == 30 + 5
    assert sizes[-1] <= 35


def test_a_period_is_the_longest_pause():
    part = Recurrence(alpha=0.5, recent=2)
    state = part.state()
    for t in range(10, 40):
        mass = torch.zeros(1, t + 1)
        mass[0, 3 if t % 7 == 0 else t] = 1.0
        part.watch(
            Glimpse(
                layer=0,
                prompt=False,
                positions=torch.tensor([t], dtype=torch.int32),
                lengths=torch.tensor([t + 1], dtype=torch.int32),
                mass=mass,
                group=1,
            ),
            state,
        )
    assert int(state.pause.of(0, torch.tensor([40]))[0, 3]) == 7


def test_an_alpha_that_nothing_reaches_leaves_the_newest():
    q, k, v = streams(TOKENS)
    steps = drive(load("lazy-eviction", keep=20, window=5, alpha=1.5), q, k, v, prompt=PROMPT)
    positions = steps[-1].positions[0]
    assert positions == list(range(positions[0], TOKENS)), "equal scores: later entries stay"


def test_scores_of_entries_that_nobody_saw_are_finite():
    segment = Segment(k=torch.zeros(1, 4, 8), v=torch.zeros(1, 4, 8), lengths=torch.tensor([4]))
    seen = Observation(layer=0, layers=1, spec=AttentionSpec(scale=1.0), segment=segment, tokens=4)
    part = Recurrence(recent=0)
    assert bool(part.score(seen, part.state()).value.isfinite().all())
