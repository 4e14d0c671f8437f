"""The constructed start: each kind of head does before any training what it was written for."""

import pytest
import torch
from transformers import LlamaForCausalLM

from winnow.models.embedded import documents, init, language
from winnow.models.embedded.shape import GROUP

IDS = language.identifiers()
PIECES = language.vocabulary()


@pytest.fixture(scope="module")
def start():
    model = LlamaForCausalLM(init.config()).eval()
    init.construct(model, 0)
    model.set_attn_implementation("eager")
    return model


@torch.inference_mode()
def attention(model, pieces, positions=None):
    """Per layer ``[heads, T, T]``, and the tokens that the model finds likeliest."""
    ids = torch.tensor([[IDS[piece] for piece in pieces]])
    told = model(
        ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        output_attentions=True,
        use_cache=False,
    )
    return [mass[0] for mass in told.attentions], [PIECES[i] for i in told.logits[0].argmax(1)]


def query_heads(kind):
    return [(layer, kv * GROUP + g) for layer, kv in kind for g in range(GROUP)]


def asked(document):
    """Pieces of a document with all its turns, and where each reply begins."""
    pieces, replies = [language.BOS, *document.pieces], []
    for turn in document.turns:
        pieces += turn.question_pieces
        replies.append(len(pieces))
        pieces += turn.reply_pieces
    return pieces, replies


def test_nothing_is_taken_from_the_first_token(start):
    ids = torch.tensor([[IDS[language.BOS]]])
    with torch.inference_mode():
        states = start(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    for state in states[2:]:
        torch.testing.assert_close(state, states[1], atol=1e-5, rtol=0)


def test_random_parts_write_nothing(start):
    for block in start.model.layers:
        assert not block.mlp.down_proj.weight.any()
        assert block.mlp.up_proj.weight.all()


@pytest.mark.parametrize("gap", [0, 60, 1500])
def test_section_heads_find_the_heading_above(start, gap):
    """Also where ``gap`` positions are left out before each heading and each question."""
    document = documents.make("joint-recall", tokens=500, seed=11, turns=6, facts=16)
    pieces, _ = asked(document)
    steps = torch.ones(1, len(pieces), dtype=torch.long)
    opens = [i for i, piece in enumerate(pieces) if piece in (language.CONTEXT, language.QUESTION)]
    steps[0, opens] += gap
    masses, _ = attention(start, pieces, steps.cumsum(1) - 1)
    names = [i for i, piece in enumerate(pieces) if piece in language.CONTEXTS]
    checked = 0
    for layer, head in query_heads(init.SECTIONS):
        for place, piece in enumerate(pieces):
            if piece in (language.ARROW, language.ANSWER):
                above = max(name for name in names if name < place)
                assert masses[layer][head, place, above] > 0.95
                checked += 1
    assert checked == 2 * (16 + 6)


def test_section_heads_rest_where_there_are_no_sections(start):
    pieces, _ = asked(documents.make("key-value", tokens=400, seed=1, turns=4))
    masses, _ = attention(start, pieces)
    for layer, head in query_heads(init.SECTIONS):
        assert masses[layer][head, :, 0].min() > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_extreme_heads_find_the_extreme(start, seed):
    document = documents.make("extrema", tokens=500, seed=seed, turns=8, filler="words")
    pieces, replies = asked(document)
    masses, likeliest = attention(start, pieces)
    for turn, place in zip(document.turns, replies, strict=True):
        assert likeliest[place - 1] == turn.reply_pieces[0]
        stated = [i for i in range(place) if pieces[i] == turn.reply_pieces[0]]
        for layer, head in query_heads(init.EXTREMES):
            assert masses[layer][head, place - 1, stated].sum() > 0.9


@pytest.mark.parametrize("task", documents.TASKS)
def test_most_replies_are_known_before_training(start, task):
    """Nine in ten of the tokens of all replies, given those before them."""
    right = count = 0
    for seed in range(3):
        document = documents.make(task, tokens=500, seed=seed, turns=4, facts=16)
        pieces, replies = asked(document)
        _, likeliest = attention(start, pieces)
        for turn, place in zip(document.turns, replies, strict=True):
            for i in range(len(turn.reply_pieces)):
                right += likeliest[place + i - 1] == pieces[place + i]
                count += 1
    assert right >= 0.9 * count


def test_codes_keep_away():
    generator = torch.Generator().manual_seed(0)
    basis = torch.eye(10)[:8]
    codes = init.spread(64, 10, generator, away=basis)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(64))
    free = init.spread(64, 10, torch.Generator().manual_seed(0))
    assert (codes @ basis.T).max() < (free @ basis.T).max() - 0.05
    products = codes @ codes.T - torch.eye(64)
    assert products.max() < 0.8
