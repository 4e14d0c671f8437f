"""Hogwild! Inference: shared blocks against keys that are turned to where a view has them, and its loop."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import winnow
from tests.parity.families import make
from winnow.engine.request import SamplingParams, Stats
from winnow.engine.shared_blocks import Block, View, forward
from winnow.engine.workers import Hogwild

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 64,
    },
}


def llama(scaling: str = "default", seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.2,
        rope_parameters=SCALINGS[scaling],
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=SCALINGS)
def llm(request) -> winnow.LLM:
    return winnow.load(llama(request.param))


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(96, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def written(llm, tokens) -> Block:
    block = Block(llm.model)
    forward(llm.model, [View([block])], [tokens])
    return block


# ---------------------------------------------------------------------------------- one worker


def test_one_worker_equals_ordinary_decoding(llm):
    ordinary = llm.generate(prompt(40), max_new_tokens=20, ignore_eos=True)
    for layout in ("contiguous", "interleaved", "combined"):
        how = Hogwild(layout=layout, names=("Alice",), header="", step_end="")
        ours = llm.workers(prompt(40), how, max_new_tokens=20, ignore_eos=True)
        assert ours.token_ids == [ordinary.token_ids]
        assert ours.steps == 20


def test_blocks_of_one_text_equal_the_text(llm):
    """Entries of a text that was read block by block, each seeing those before it, are those of the text."""
    text = prompt(60)
    a, b = Block(llm.model), Block(llm.model)
    forward(llm.model, [View([a])], [text[:25]])
    logits = forward(llm.model, [View([a, b])], [text[25:]])
    whole = forward(llm.model, [View([Block(llm.model)])], [text])
    torch.testing.assert_close(logits, whole, atol=2e-4, rtol=0)


# ---------------------------------------------------------------------------------- turning


def test_turning_the_query_equals_turning_the_keys(llm):
    """A view of three blocks that were written alone: keys turned to their places, one dense attention."""
    texts = [prompt(n, seed) for seed, n in enumerate((17, 9, 23))]
    blocks = [written(llm, text) for text in texts]
    token = prompt(1, 9)
    own = Block(llm.model)
    ours = forward(llm.model, [View([*blocks, own])], [token])

    moved = Block(llm.model)
    for text in texts:
        written(llm, text).move_into(moved, llm.model)
    assert len(moved) == 49
    theirs = forward(llm.model, [View([moved])], [token])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_moving_a_block_turns_it_once(llm):
    text = prompt(20, 3)
    alone, base = written(llm, text), written(llm, prompt(31))
    before = [alone.store.decoded(layer).k[:, :20].clone() for layer in range(3)]
    alone.move_into(base, llm.model)
    assert len(alone) == 0
    assert base.tokens[-20:] == text
    for layer, k_HTD in enumerate(before):
        turned = llm.model.rotary(layer).turn(k_HTD, torch.full((20,), 31))
        torch.testing.assert_close(base.store.decoded(layer).k[:, 31:51], turned)
        # At unit scale nothing grows, however often it is moved.
        torch.testing.assert_close(turned.norm(dim=-1), k_HTD.norm(dim=-1), rtol=1e-4, atol=0)


# ---------------------------------------------------------------------------------- several workers


def test_a_worker_sees_what_the_others_write_in_the_same_step(llm):
    common = written(llm, prompt(30))
    a, b = Block(llm.model), Block(llm.model)
    views = [View([common, b, a]), View([common, a, b])]
    one, other = prompt(1, 5), prompt(1, 6)
    together = forward(llm.model, views, [one, other])

    # The same by hand: what the other writes in this step depends on what this one writes, layer by
    # layer, so only the first layer can be had from a call of its own.
    c, d = Block(llm.model), Block(llm.model)
    forward(llm.model, [View([common, c])], [other])
    alone = forward(llm.model, [View([common, d])], [one])
    assert not torch.allclose(together[0], alone[0], atol=1e-3), "the other's token was not seen"
    first = c.store.decoded(0).k[:, :1]
    torch.testing.assert_close(b.store.decoded(0).k[:, :1], first, atol=1e-5, rtol=1e-4)


def test_the_order_of_the_workers_in_the_batch_does_not_matter(llm):
    def step(order):
        common = written(llm, prompt(30))
        blocks = [written(llm, prompt(n, n)) for n in (5, 8, 3)]
        views = [View([common, *(b for b in blocks if b is not own), own]) for own in blocks]
        tokens = [prompt(1, 20 + i) for i in range(3)]
        return forward(llm.model, [views[i] for i in order], [tokens[i] for i in order])

    straight, turned = step([0, 1, 2]), step([2, 0, 1])
    torch.testing.assert_close(straight[[2, 0, 1]], turned, atol=1e-4, rtol=0)


class Dense:
    """A step of several workers in plain PyTorch: every view's keys turned to where they lie in it."""

    def __init__(self, model, views, counts):
        self.model, self.views = model, views
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self.rows = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        self.written = {id(view.own): rows for view, rows in zip(views, self.rows, strict=True)}
        self.offsets, self.positions = [], []
        for view, n in zip(views, counts, strict=True):
            at, offsets = 0, []
            for block in view.blocks:
                offsets.append(at)
                rows = self.written.get(id(block), slice(0, 0))
                at += len(block) + rows.stop - rows.start
            self.offsets.append(offsets)
            self.positions.append(torch.arange(at - n, at))

    def turned(self, layer, k_HSD, by):
        rotary = self.model.rotary(layer)
        return k_HSD if rotary is None else rotary.turn(k_HSD, torch.full((k_HSD.shape[1],), by))

    def entries(self, layer, block, k_NHD, v_NHD):
        """What a block holds with what is written to it now, keys as if it began at 0."""
        held = block.store.decoded(layer)
        k_HSD, v_HSD = held.k[:, : len(block)], held.v[:, : len(block)]
        for rows, view, offsets in zip(self.rows, self.views, self.offsets, strict=True):
            if view.own is block:
                new_HTD = self.turned(layer, k_NHD[rows].transpose(0, 1), -offsets[-1])
                k_HSD = torch.cat([k_HSD, new_HTD], 1)
                v_HSD = torch.cat([v_HSD, v_NHD[rows].transpose(0, 1)], 1)
        return k_HSD, v_HSD

    def __call__(self, layer, q_NHD, k_NHD, v_NHD, spec):
        outs = []
        for rows, view, offsets in zip(self.rows, self.views, self.offsets, strict=True):
            keys, values = [], []
            for block, at in zip(view.blocks, offsets, strict=True):
                k_HSD, v_HSD = self.entries(layer, block, k_NHD, v_NHD)
                keys.append(self.turned(layer, k_HSD, at))
                values.append(v_HSD)
            outs.append(causal(q_NHD[rows], torch.cat(keys, 1), torch.cat(values, 1), spec))
        return torch.cat(outs)


def causal(q_THD, k_HSD, v_HSD, spec):
    """Attention of the last queries of a text over all of it, with whatever the model puts on top."""
    group = q_THD.shape[1] // len(k_HSD)
    k_ASD, v_ASD = k_HSD.repeat_interleave(group, 0), v_HSD.repeat_interleave(group, 0)
    logits_ATS = torch.einsum("tad,asd->ats", q_THD, k_ASD) * spec.scale
    if spec.softcap is not None:
        logits_ATS = spec.softcap * torch.tanh(logits_ATS / spec.softcap)
    at_S = torch.arange(k_HSD.shape[1])
    back_TS = at_S[-len(q_THD) :, None] - at_S
    seen_TS = (back_TS >= 0) & (back_TS < (spec.window or len(at_S)))
    logits_ATS = logits_ATS.masked_fill(~seen_TS, -torch.inf)
    if spec.sinks is not None:
        sinks_AT1 = spec.sinks[:, None, None].expand(-1, len(q_THD), 1)
        logits_ATS = torch.cat([logits_ATS, sinks_AT1], 2)
    return torch.einsum("ats,asd->tad", logits_ATS.softmax(2)[..., : len(at_S)], v_ASD)


@pytest.mark.parametrize("family", ["llama", "yarn", "glm4", "gemma2", "gpt-oss", "smollm3"])
@pytest.mark.parametrize("news", [(1, 1, 1), (1, 3, 1), (2, 1, 1)])
def test_a_step_equals_dense_attention_over_every_view(family, news):
    """Blocks that all see, one that only one sees, workers with one token beside workers with several."""
    small = winnow.load(make(family))
    common, a, b, extra = (written(small, prompt(n, n)) for n in (21, 6, 9, 4))
    new = Block(small.model)
    views = [View([common, b, new, a]), View([common, extra, new, a, b]), View([common, a, new])]
    tokens = [prompt(n, 40 + i) for i, n in enumerate(news)]
    dense = Dense(small.model, views, news)
    everything = torch.tensor([token for of in tokens for token in of])
    last = torch.tensor(news).cumsum(0) - 1
    wanted = small.model.forward(everything, torch.cat(dense.positions), last, dense)
    got = forward(small.model, views, tokens)
    torch.testing.assert_close(got, wanted, atol=3e-4, rtol=1e-3)


def test_what_workers_read_together_is_read_once(llm):
    common, own = written(llm, prompt(30)), [written(llm, prompt(n, n)) for n in (5, 8, 3)]
    views = [View([common, *(b for b in own if b is not mine), mine]) for mine in own]
    stats = Stats()
    forward(llm.model, views, [prompt(1, i) for i in range(3)], stats=stats)
    seen = 30 + 5 + 8 + 3 + 3  # every entry, those of this step among them
    assert stats.decode_score_entries == 3 * seen * 4 * 3  # workers, query heads, layers
    assert sum(stats.bytes_read.values()) == seen * 2 * 3 * (2 * 16 * 4)  # KV heads, layers, K and V


@pytest.mark.parametrize("layout", ["contiguous", "interleaved", "combined"])
@pytest.mark.parametrize("count", [2, 4])
def test_every_layout_runs(layout, count):
    llm = winnow.load("embedded")
    names = tuple("ABCD"[:count])
    how = Hogwild(layout=layout, names=names, header="\n", step_end="\n")
    result = llm.workers("key one is two.", how, max_new_tokens=12, ignore_eos=True)
    assert [len(ids) for ids in result.token_ids] == [12] * count
    again = llm.workers("key one is two.", how, max_new_tokens=12, ignore_eos=True)
    assert again.token_ids == result.token_ids
    assert result.bytes_stored > 0


def test_steps_go_to_the_history_in_the_order_in_which_they_end(llm):
    """With every token an end of a step, the history holds all tokens, and blocks stay short."""
    seen = []

    def decode(tokens):
        seen.append(list(tokens))
        return "".join(f"<{t}>" for t in tokens)

    how = Hogwild(layout="combined", names=("A", "B"), header="h", step_end=">")
    result = how.run(
        llm.model, prompt(20), SamplingParams(max_new_tokens=6, ignore_eos=True), lambda text: [7], decode
    )
    assert [len(ids) for ids in result.token_ids] == [6, 6]
    assert result.steps == 6


def test_nudge_and_answer(llm):
    asked = []

    def encode(text):
        asked.append(text)
        return [len(text) % 90 + 1] if text else []

    how = Hogwild(
        names=("A",), header="h", step_end="#", nudge="?", nudge_every=4, answer="so:", answer_tokens=3
    )
    result = how.run(
        llm.model,
        prompt(20),
        SamplingParams(max_new_tokens=12, ignore_eos=True),
        encode,
        lambda tokens: "#" if len(tokens) == 5 else "." * len(tokens),
    )
    assert asked.count("h?") == 2, "after five and ten tokens"
    assert len(result.answer) == 3


# ---------------------------------------------------------------------------------- refusals


def test_bad_input():
    llm = winnow.load(llama())
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.workers([])
    with pytest.raises(ValueError, match="no workers"):
        Hogwild(names=())
    with pytest.raises(ValueError, match="layout"):
        Hogwild(layout="other")
    with pytest.raises(ValueError, match="without one"):
        winnow.load(llama(), recipe="snapkv").workers(prompt(5))
    with pytest.raises(ValueError, match="takes 2048"):
        llm.workers(prompt(2040), Hogwild(header=""), max_new_tokens=50, ignore_eos=True)


def test_learned_positions_are_refused():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    llm = winnow.load(GPT2LMHeadModel(config).eval())
    with pytest.raises(ValueError, match="position"):
        llm.workers(prompt(10), Hogwild(header=""), max_new_tokens=4, ignore_eos=True)
