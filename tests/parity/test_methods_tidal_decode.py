"""TidalDecode against top-k per layer in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from winnow.kernels.decode import decode
from winnow.loading.protocol import DecodeLayer
from winnow.methods import load
from winnow.types import AttentionSpec, Segment

HEADS, SIZE, LAYERS = 2, 16, 6
SPEC = AttentionSpec(scale=SIZE**-0.5)


def layers(length: int, group: int, *, alike: bool = False):
    make = torch.Generator().manual_seed(length)
    out = []
    for _ in range(LAYERS):
        q = 2 * torch.randn(HEADS * group, SIZE, generator=make)
        k, v = (torch.randn(HEADS, length, SIZE, generator=make) for _ in "kv")
        out.append((q, k, v))
    return [out[0]] * LAYERS if alike else out


def step(recipe, given, state):
    """Outputs and masks ``[H, S]`` of every layer of one step."""
    part, length = recipe.loading, given[0][1].shape[1]
    outs, masks = [], []
    for number, (q, k, v) in enumerate(given):
        segment = Segment(k=k, v=v, lengths=torch.full((HEADS,), length, dtype=torch.int32))
        ctx = DecodeLayer(
            layer=number, layers=LAYERS, q=q, position=length - 1, segments=(segment,), spec=SPEC
        )
        view = part.select(ctx, state)
        selection = view.selections[0] if view.selections else None
        result = decode(
            q, segment, spec=SPEC, position=length - 1, selection=selection, want_logits=view.want_logits
        )
        if view.want_logits:
            part.observe(ctx, [result.logits], state)
        mask = torch.ones(HEADS, length, dtype=torch.bool)
        if selection is not None:
            mask[:] = False
            for h in range(HEADS):
                mask[h, selection.indices[h, : selection.counts[h]].long()] = True
        outs.append(result.out[0])
        masks.append(mask)
    return outs, masks


def top(q, k, keep):
    """``[H, S]`` bool: the ``keep`` largest logits of each KV head's group, the last entry forced."""
    group, length = q.shape[0] // HEADS, k.shape[1]
    mask = torch.zeros(HEADS, length, dtype=torch.bool)
    for h in range(HEADS):
        best = (q[h * group : (h + 1) * group] @ k[h].T).amax(0)
        best[-1] = torch.inf
        mask[h, best.argsort(descending=True)[:keep]] = True
    return mask


def attention(q, k, v, mask):
    group = q.shape[0] // HEADS
    logits = torch.einsum("nd,nsd->ns", q, k.repeat_interleave(group, 0)) * SPEC.scale
    probs = logits.masked_fill(~mask.repeat_interleave(group, 0), -torch.inf).softmax(-1)
    return torch.einsum("ns,nsd->nd", probs, v.repeat_interleave(group, 0))


@pytest.mark.parametrize("group", [1, 4])
def test_reusing_layers_read_what_the_last_selecting_layer_chose(group):
    given = layers(200, group)
    recipe = load("tidal-decode", keep=20, dense_layers=1, select_layers=(1, 4))
    outs, masks = step(recipe, given, recipe.loading.state())
    everything = torch.ones(HEADS, 200, dtype=torch.bool)
    first, second = top(*given[1][:2], 20), top(*given[4][:2], 20)
    expected = [everything, everything, first, first, everything, second]
    for (q, k, v), out, mask, want in zip(given, outs, masks, expected, strict=True):
        assert torch.equal(mask, want)
        torch.testing.assert_close(out, attention(q, k, v, want), atol=2e-5, rtol=0)


def test_keeping_everything_is_full_attention():
    given = layers(150, 4)
    recipe = load("tidal-decode", keep=150)
    for (q, k, v), out in zip(given, step(recipe, given, recipe.loading.state())[0], strict=True):
        everything = torch.ones(HEADS, 150, dtype=torch.bool)
        torch.testing.assert_close(out, attention(q, k, v, everything), atol=2e-5, rtol=0)


def test_layers_that_are_alike_equal_top_k_per_layer():
    given = layers(200, 4, alike=True)
    recipe = load("tidal-decode", keep=20)
    outs, _ = step(recipe, given, recipe.loading.state())
    q, k, v = given[0]
    for number in (4, 5):
        torch.testing.assert_close(outs[number], attention(q, k, v, top(q, k, 20)), atol=2e-5, rtol=0)


def test_the_published_layers_of_a_model_of_32():
    part = load("tidal-decode").loading
    state, chosen = part.state(), []
    q, k, v = layers(50, 1)[0]
    segment = Segment(k=k, v=v, lengths=torch.full((HEADS,), 50, dtype=torch.int32))
    for number in range(32):
        ctx = DecodeLayer(layer=number, layers=32, q=q, position=49, segments=(segment,), spec=SPEC)
        view = part.select(ctx, state)
        if view.want_logits:
            chosen.append(number)
            part.observe(ctx, [q.view(HEADS, SIZE) @ k[0].T], state)
    assert chosen == [2, 13]


def test_a_selecting_layer_that_the_model_lacks_is_refused():
    part = load("tidal-decode", select_layers=(2, 13)).loading
    with pytest.raises(ValueError, match=r"6 layers.*leave select_layers out.*\(2,\)"):
        part.check(6)
