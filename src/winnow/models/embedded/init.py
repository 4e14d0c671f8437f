"""The constructed start of the embedded model: weights that retrieve before any training.

A Llama of this size learns to match and copy only slowly from random weights, so the start
is written by hand, and training refines it.  The residual stream is divided into parts::

    CONTENT   what a token is, for copying        MATCH   what it is, for matching: a separator
    OUT       what comes next, for the head               flag and a code
    CONSTANT  the same in every token             BEFORE  MATCH of the three tokens before this one
    SINK      only in the first token             BALLAST makes all embeddings equally long

Layer 0 has *offset heads*: RoPE turns a constant query and a constant key so that they meet
at a distance of exactly 1, 2, 3 or 4 tokens; their values carry MATCH into BEFORE.  Later
layers have *retrieval heads*: the query holds this token's MATCH and those of the two before
it, the key the MATCH of the three tokens before the key's token, both in rotary pairs so slow
that position hardly matters within 16K.  So a query meets the token that followed the same
three tokens earlier, and the value copies its CONTENT to OUT.  Separators share one flag:
what is asked after ``A:`` was told after ``->``, ``is``, ``=`` or ``:``.  The nouns of one
category share one code, so that an example stands for its category.  Where nothing matches,
the constant in the query meets the first token's SINK, whose value is zero: an attention sink.
Other heads are *local* (the last few tokens, and the sink) or rest on the sink, free to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.models.embedded import language as lang

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["RETRIEVAL", "config", "construct"]

HIDDEN, LAYERS, QUERY_HEADS, KV_HEADS, HEAD, MLP = 256, 6, 8, 4, 64, 256
GROUP = QUERY_HEADS // KV_HEADS
PAIRS = HEAD // 2
THETA = 1e10

#: (layer, KV head) of the retrieval and of the local heads; KV heads 0 and 1 of layer 0 are offset heads
RETRIEVAL = ((1, 0), (2, 1), (2, 3), (3, 2), (4, 0), (5, 1))
LOCAL = ((0, 2), (0, 3), (1, 2), (2, 0), (3, 0), (4, 3), (5, 2))

FLAG = 1  # length of the separator flag
BITS = 10  # length of a match code
CONTENT = slice(0, 64)
OUT = slice(64, 128)
MATCH = slice(128, 128 + FLAG + BITS)
BEFORE = tuple(slice(128 + 11 * o, 139 + 11 * o) for o in (1, 2, 3))
CONSTANT, SINK, BALLAST = 172, 173, 174  # what follows them is free

LENGTH = 7.5**0.5  # of every embedding
SHARED = 1.5  # of its constant part
SHARPNESS = 22.0  # logits between a head's match and one with a token less
RESTING = 1.5  # the sink's logit, in units of SHARPNESS
IDLE = 16.0  # the sink's logit in a head without a task
COPIED = 4.0  # how strongly all retrieval heads together write to OUT

#: weights of the fastest rotary pairs in an offset head: nearly the largest gap between the wanted
#: distance and any other up to 16K that a unit of logits can give (0.22; found by search)
OFFSET_WEIGHTS = (0.470, 0.074, 0.047, 0.072, 0.069, 0.046, 0.062, 0.041, 0.023, 0.046, 0.025, 0.026)
OFFSET_SHARPNESS = 45.0
#: the same for a local head, which fades over the last few tokens instead
LOCAL_WEIGHTS = (0.0, 0.02, 0.04, 0.15, 0.15, 0.15, 0.13, 0.12, 0.12, 0.12)
LOCAL_SHARPNESS = 60.0
#: how long the residual stream is where a layer begins, while a head retrieves
LENGTHS = (LENGTH, 3.2, 3.4, 4.1, 4.6, 5.1)


def config() -> LlamaConfig:
    """The model's shape."""
    from transformers import LlamaConfig

    ids = lang.identifiers()
    return LlamaConfig(
        vocab_size=len(ids),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=ids[lang.BOS],
        # an answer is one line
        eos_token_id=ids[lang.NEWLINE],
        pad_token_id=ids[lang.PAD],
    )


def spread(n: int, dimensions: int, generator: torch.Generator, steps: int = 300) -> Tensor:
    """``n`` unit vectors pushed apart, so that the largest product of two is small.  ``[n, dimensions]``."""
    codes = torch.randn(n, dimensions, generator=generator)
    for step in range(steps):
        codes = codes / codes.norm(dim=1, keepdim=True)
        products = codes @ codes.T
        products.fill_diagonal_(-1.0)
        push = torch.softmax(12.0 * products, dim=1)
        codes = codes - (1.0 - step / steps) * 0.3 * (push @ codes)
    codes /= codes.norm(dim=1, keepdim=True)
    return codes


def _content(generator: torch.Generator) -> Tensor:
    """A code for every token, for copying and for the head.  ``[vocabulary, 64]``."""
    return spread(len(lang.vocabulary()), 64, generator)


def _match(generator: torch.Generator) -> Tensor:
    """Flag and code of every token, for matching; zero where nothing is matched.  ``[vocabulary, 11]``."""
    ids = lang.identifiers()
    match = torch.zeros(len(ids), FLAG + BITS)
    match[[ids[piece] for piece in lang.SEPARATORS], 0] = 1.0
    for pieces in (lang.FIRST_SYLLABLES, lang.SECOND_SYLLABLES, lang.FIRST_NUMBERS, lang.SECOND_NUMBERS):
        match[[ids[piece] for piece in pieces], FLAG:] = spread(len(pieces), BITS, generator)
    basis = torch.linalg.qr(torch.randn(BITS, BITS, generator=generator)).Q
    for nouns, code in zip(lang.CATEGORIES, basis, strict=False):
        match[[ids[piece] for piece in nouns], FLAG:] = code
    match[[ids[piece] for piece in lang.LABELS], FLAG:] = spread(len(lang.LABELS), BITS, generator)
    # other words help to find a repeated line, but never as much as a name does
    others = [ids[piece] for piece in (*lang.FILLER, *lang.OPENERS, *lang.CHARACTERS, *lang.BYTES)]
    unset = [token for token in others if not match[token].any()]
    match[unset, FLAG:] = 0.3 * spread(len(unset), BITS, generator, steps=30)
    return match


@dataclass(frozen=True)
class _Codes:
    content: Tensor  # [vocabulary, 64]
    match: Tensor  # [vocabulary, 11]
    state: Tensor  # of the generator, once both are drawn


@cache
def _codes(seed: int) -> _Codes:
    """The codes of a seed; kept, because pushing them apart takes seconds."""
    generator = torch.Generator().manual_seed(seed)
    content = _content(generator)
    match = _match(generator)
    return _Codes(content, match, generator.get_state())


#: never copied: the line around a value, which the token before it already tells
STRUCTURE = (
    *(*lang.SPECIAL, lang.NEWLINE, *lang.SEPARATORS, lang.QUESTION, lang.KEY, lang.SET, lang.LABEL),
    *(lang.STOP, *lang.SPACED[:3]),
)


def _embeddings(codes: _Codes) -> Tensor:
    """``[vocabulary, HIDDEN]``, all rows of one length."""
    ids = lang.identifiers()
    table = torch.zeros(len(ids), HIDDEN)
    table[:, CONTENT] = codes.content
    table[[ids[piece] for piece in STRUCTURE], CONTENT] = 0.0
    table[:, MATCH] = codes.match
    table[:, CONSTANT] = SHARED
    for pieces, following in (
        (lang.SECOND_NUMBERS, lang.NEWLINE),
        (lang.LABELS, lang.NEWLINE),
        (lang.SECOND_SYLLABLES, lang.EQUALS),
    ):
        table[[ids[piece] for piece in pieces], OUT] = 1.7 * codes.content[ids[following]]
    rest = (LENGTH**2 - table.square().sum(1)).sqrt()
    table[:, BALLAST] = rest
    bos = ids[lang.BOS]
    table[bos, BALLAST], table[bos, SINK] = 0.0, rest[bos]
    return table


def _look_back(
    query: Tensor,
    key: Tensor,
    head: int,
    distance: int,
    weights: tuple[float, ...],
    sharpness: float,
    length: float,
) -> None:
    """Let a query head look back ``distance`` tokens; the weights of the layer are changed in place."""
    angles = THETA ** (-torch.arange(len(weights)) / PAIRS) * distance
    # every pair adds sharpness * weight * cos(angle of the error) to the logit
    constant = SHARED * HIDDEN**0.5 / length
    gain = (sharpness * HEAD**0.5 * torch.tensor(weights)).sqrt() / constant
    pairs = torch.arange(len(weights))
    query[head * HEAD + pairs, CONSTANT] = gain * angles.cos()
    query[head * HEAD + PAIRS + pairs, CONSTANT] = -gain * angles.sin()
    key[head // GROUP * HEAD + pairs, CONSTANT] = gain


def _sink(query: Tensor, key: Tensor, head: int, logit: float, length: float) -> None:
    """Let a query head rest on the first token with a logit of about ``logit``; in place."""
    constant = SHARED * HIDDEN**0.5 / length
    at_first = (LENGTH**2 - SHARED**2) ** 0.5 * HIDDEN**0.5 / LENGTH
    gain = (logit * HEAD**0.5 / (constant * at_first)) ** 0.5
    query[head * HEAD + HEAD - 1, CONSTANT] = gain
    key[head // GROUP * HEAD + HEAD - 1, SINK] = gain


def _slow_dimensions() -> Tensor:
    """Dimensions of a head whose rotary angle stays small within 16K, slowest pair last and excepted."""
    first = torch.arange(15, PAIRS - 1)
    return torch.cat([first, first + PAIRS])


def _retrieve(layer: dict[str, Tensor], kv_head: int, length: float, generator: torch.Generator) -> None:
    """Make one KV head and its query heads match and copy; weights are changed in place."""
    slow = _slow_dimensions()
    slots = (slow[:11], slow[11:22], slow[22:32])
    asked = (MATCH, BEFORE[0], slice(BEFORE[1].start + FLAG, BEFORE[1].stop))
    told = (BEFORE[0], BEFORE[1], slice(BEFORE[2].start + FLAG, BEFORE[2].stop))
    # of a unit in the residual stream: where a head asks, and where a value is stated
    asking, stating = HIDDEN**0.5 / length, HIDDEN**0.5 / LENGTHS[1]
    gain = (SHARPNESS * HEAD**0.5 / (asking * stating)) ** 0.5
    rows = kv_head * HEAD + torch.arange(HEAD)
    for slot, part in zip(slots, told, strict=True):
        layer["k"][kv_head * HEAD + slot, part] += gain * torch.eye(len(slot))
    layer["v"][rows, CONTENT] += torch.eye(HEAD)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        _sink(layer["q"], layer["k"], head, RESTING * SHARPNESS, length)
        for slot, part in zip(slots, asked, strict=True):
            emphasis = 0.9 + 0.2 * torch.rand((), generator=generator)
            layer["q"][head * HEAD + slot, part] += emphasis * gain * torch.eye(len(slot))
        share = COPIED / (len(RETRIEVAL) * GROUP) / stating
        layer["o"][OUT, head * HEAD + torch.arange(HEAD)] += share * torch.eye(HEAD)


@torch.no_grad()
def construct(model: LlamaForCausalLM, seed: int) -> None:
    """Write the constructed start into a model of `config`, in place.

    Parameters
    ----------
    model : LlamaForCausalLM
        In float32.
    seed : int
        Of the codes and of the small random rest of all matrices.
    """
    codes = _codes(seed)
    generator = torch.Generator()
    generator.set_state(codes.state)
    model.model.embed_tokens.weight.copy_(_embeddings(codes))
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, OUT] = 2.0 * codes.content
    for number, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        layer = {
            name: projection.weight
            for name, projection in (
                ("q", attention.q_proj),
                ("k", attention.k_proj),
                ("v", attention.v_proj),
                ("o", attention.o_proj),
            )
        }
        for weight, scale in (
            (layer["q"], 0.005),
            (layer["k"], 0.005),
            (layer["v"], 0.005),
            (mlp.gate_proj.weight, HIDDEN**-0.5),
            (mlp.up_proj.weight, HIDDEN**-0.5),
            (layer["o"], 0.02 / (2 * LAYERS) ** 0.5),
            (mlp.down_proj.weight, 0.02 / (2 * LAYERS) ** 0.5),
        ):
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
        length = LENGTHS[number]
        for head in range(QUERY_HEADS):
            role = (number, head // GROUP)
            if number == 0 and head < 4:
                _look_back(layer["q"], layer["k"], head, head + 1, OFFSET_WEIGHTS, OFFSET_SHARPNESS, length)
            elif role in LOCAL:
                _look_back(layer["q"], layer["k"], head, 2, LOCAL_WEIGHTS, LOCAL_SHARPNESS, length)
            if role in LOCAL and number > 0:
                _sink(layer["q"], layer["k"], head, LOCAL_SHARPNESS, length)
            elif number > 0 and role not in RETRIEVAL:
                _sink(layer["q"], layer["k"], head, IDLE, length)
        if number == 0:
            eye = torch.eye(FLAG + BITS)
            for kv_head in (0, 1):
                layer["v"][kv_head * HEAD + torch.arange(FLAG + BITS), MATCH] += eye
            for head, part in enumerate(BEFORE):
                layer["o"][part, head * HEAD + torch.arange(FLAG + BITS)] += eye * LENGTH / HIDDEN**0.5
        for retrieval_layer, kv_head in RETRIEVAL:
            if retrieval_layer == number:
                _retrieve(layer, kv_head, length, generator)
