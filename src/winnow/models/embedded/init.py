"""The constructed start of the embedded model: weights that retrieve before any training.

A Llama of this size learns to match and copy only slowly from random weights, so the start
is written by hand, and training refines it.  The residual stream is divided into parts
(`shape`)::

    CONTENT   what a token is, for copying        MATCH   what it is, for matching: a separator
    OUT       what comes next, for the head               flag and a code
    CONSTANT  the same in every token             BEFORE  MATCH of the three tokens before this one
    SINK      only in the first token             BALLAST makes all embeddings equally long
    SECTION   the code of the section's name      FOUND   the code of what a search has found

Layer 0 has *offset heads*: RoPE turns a constant query and a constant key so that they meet
at a distance of exactly 1, 2, 3 or 4 tokens; their values carry MATCH into BEFORE.  Later
layers have *retrieval heads*: the query holds this token's MATCH and those of the two before
it, the key the MATCH of the three tokens before the key's token, both in rotary pairs so slow
that position hardly matters within 16K.  So a query meets the token that followed the same
three tokens earlier, and the value copies its CONTENT to OUT.  Separators share one flag:
what is asked after ``A:`` was told after ``->``, ``is``, ``=`` or ``:``.  The nouns of one
category share one code, so that an example stands for its category.  Where nothing matches,
the constant in the query meets the first token's SINK, whose value is zero: an attention sink.

Four kinds of head serve one task each, and rest on the sink in the others:

- *Section*: of the tokens that name a section it finds the latest, and writes its code into
  SECTION.  In a document that is the heading above, in a question the section asked for.
- *Joint*: a retrieval head for what follows a separator that compares SECTION too.
- *Extreme*: of the numbers that follow a series' name, it looks at the one that lies highest,
  or lowest, as the token two before asks: each number's embedding says how high it is, and a
  step of one in the number is a gap of five in the logit.
- *Find* and *fetch*: two searches, one after the other, for strings of which both ends are
  given.  Where a string begins, *find* meets the end of the one that has this beginning and the
  ending asked for, and takes the code of its second syllable; in a later layer *fetch* meets a
  token of that code and copies it.  The beginning itself *fetch* copies from the question.

Other heads are *local* (the last few tokens, and the sink); they, the fourth offset head and all MLPs
write nothing at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.models.embedded import circuits
from winnow.models.embedded import language as lang
from winnow.models.embedded.circuits import Layer, Match
from winnow.models.embedded.shape import (
    ASK,
    ASK_BEFORE,
    BALLAST,
    BEFORE,
    BITS,
    CONSTANT,
    CONTENT,
    DOTS,
    DOTS_BEFORE,
    FLAG,
    FOUND,
    GROUP,
    HEAD,
    HIDDEN,
    HIGH,
    KV_HEADS,
    LENGTH,
    LENGTHS,
    LOW,
    MATCH,
    NAMES,
    OUT,
    PAIRS,
    QUERY_HEADS,
    SECTION,
    SERIES,
    SERIES_BEFORE,
    SHARED,
    SINK,
    code,
    config,
    flag_and_code,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["GROUP", "HEAD", "LENGTH", "QUERY_HEADS", "RETRIEVAL", "config", "construct"]

#: (layer, KV head) of each kind; KV heads 0 and 1 of layer 0 are offset heads
RETRIEVAL = ((1, 0), (2, 1), (2, 3), (3, 2), (4, 0), (5, 1))
LOCAL = ((0, 2), (5, 0), (1, 2), (2, 0), (3, 0), (4, 3), (5, 2))
SECTIONS, FINDS = ((0, 3),), ((1, 3),)
EXTREMES, JOINTS, FETCHES = ((4, 1), (5, 3)), ((1, 1), (2, 2), (3, 1)), ((3, 3), (4, 2))

SHARPNESS = 22.0  # logits between a head's match and one with a token less
RESTING = 1.5  # the sink's logit, in units of SHARPNESS
COPIED = 4.0  # how strongly all heads of a kind together write to OUT
NARROW, JOINED = 30.0, 40.0  # SHARPNESS of find and fetch heads, and of joint heads
#: an extreme head's logits: for the series asked for, and between the numbers 10 and 99
OWN, RANGE = 500.0, 450.0
#: the least part of HIGH and LOW; more than the sink takes, so that every number outdoes it
LEAST = 0.25


def spread(
    n: int, dimensions: int, generator: torch.Generator, steps: int = 300, away: Tensor | None = None
) -> Tensor:
    """``n`` unit vectors pushed apart, and ``away`` from some others.  ``[n, dimensions]``."""
    codes = torch.randn(n, dimensions, generator=generator)
    others = torch.empty(0, dimensions) if away is None else away
    for step in range(steps):
        codes = codes / codes.norm(dim=1, keepdim=True)
        everything = torch.cat([codes, others])
        products = codes @ everything.T
        products.fill_diagonal_(-1.0)
        push = torch.softmax(12.0 * products, dim=1)
        codes = codes - (1.0 - step / steps) * 0.3 * (push @ everything)
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
    basis = torch.linalg.qr(torch.randn(BITS, BITS, generator=generator)).Q
    # a noun and the end of a name stand before separators both, and are not to be mistaken
    match[[ids[piece] for piece in lang.SECOND_SYLLABLES], FLAG:] = spread(
        len(lang.SECOND_SYLLABLES), BITS, generator, away=basis[: len(lang.CATEGORIES)]
    )
    for pieces in (lang.FIRST_SYLLABLES, lang.FIRST_NUMBERS, lang.SECOND_NUMBERS):
        match[[ids[piece] for piece in pieces], FLAG:] = spread(len(pieces), BITS, generator)
    for nouns, one in zip(lang.CATEGORIES, basis, strict=False):
        match[[ids[piece] for piece in nouns], FLAG:] = one
    match[[ids[piece] for piece in lang.LABELS], FLAG:] = spread(len(lang.LABELS), BITS, generator)
    match[[ids[piece] for piece in lang.CONTEXTS], FLAG:] = spread(len(lang.CONTEXTS), BITS, generator)
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
    *(piece for piece in lang.LATER if piece not in lang.CONTEXTS),
)


def _embeddings(codes: _Codes) -> Tensor:
    """``[vocabulary, HIDDEN]``, all rows of one length."""
    ids = lang.identifiers()
    table = torch.zeros(len(ids), HIDDEN)
    table[:, CONTENT] = codes.content
    table[[ids[piece] for piece in STRUCTURE], CONTENT] = 0.0
    table[:, flag_and_code(MATCH)] = codes.match
    table[:, MATCH.stop - 1] = (1.0 - codes.match.square().sum(1)).clamp(min=0.0).sqrt()
    table[:, CONSTANT] = SHARED
    for pieces, following in (
        (lang.SECOND_NUMBERS, lang.NEWLINE),
        (lang.LABELS, lang.NEWLINE),
        (lang.SECOND_SYLLABLES, lang.EQUALS),
    ):
        table[[ids[piece] for piece in pieces], OUT] = 1.7 * codes.content[ids[following]]
    for number, piece in enumerate(lang.FIRST_NUMBERS):
        share = number / (len(lang.FIRST_NUMBERS) - 1)
        table[ids[piece], HIGH] = LEAST + (1.0 - LEAST) * share
        table[ids[piece], LOW] = 1.0 - (1.0 - LEAST) * share
        # the end of a line, unless something that is copied says otherwise
        table[ids[piece], OUT] = 0.8 * codes.content[ids[lang.NEWLINE]]
    for number, series in enumerate(lang.SERIES):
        table[[ids[series], ids[f" {series}"]], SERIES.start + number] = 1.0
    for number, piece in enumerate((lang.LARGEST, lang.SMALLEST)):
        table[ids[piece], ASK.start + number] = 1.0
    table[[ids[piece] for piece in lang.CONTEXTS], NAMES] = 1.0
    table[ids[lang.DOTS], DOTS] = 1.0
    rest = (LENGTH**2 - table.square().sum(1)).sqrt()
    table[:, BALLAST] = rest
    bos = ids[lang.BOS]
    table[bos, BALLAST], table[bos, SINK] = 0.0, rest[bos]
    return table


def _slow_dimensions() -> Tensor:
    """Dimensions of a head whose rotary angle stays small within 16K, slowest pair last and excepted."""
    first = torch.arange(15, PAIRS - 1)
    return torch.cat([first, first + PAIRS])


def _offsets(layer: Layer) -> None:
    """Heads that carry what the last tokens were; the fourth looks back and writes nothing."""
    for head in range(4):
        circuits.look_back(layer, head, head + 1, circuits.OFFSET_WEIGHTS, circuits.OFFSET_SHARPNESS, LENGTH)
    for head, part in enumerate(BEFORE):
        circuits.write(layer, head, MATCH, part, 1.0, length=LENGTH)
    first = MATCH.stop - MATCH.start
    for head, told, into in (
        (0, SERIES, SERIES_BEFORE),
        (1, ASK, ASK_BEFORE),
        (1, slice(DOTS, DOTS + 1), slice(DOTS_BEFORE[0], DOTS_BEFORE[0] + 1)),
        (2, slice(DOTS, DOTS + 1), slice(DOTS_BEFORE[1], DOTS_BEFORE[1] + 1)),
    ):
        circuits.write(layer, head, told, into, 1.0, first=first, length=LENGTH)
        first += told.stop - told.start


def _retrieve(layer: Layer, head: int, length: float, generator: torch.Generator) -> None:
    """Match the last three tokens and copy what followed them."""
    slow = _slow_dimensions()
    circuits.rest(layer, head, RESTING * SHARPNESS, length)
    asked = (flag_and_code(MATCH), flag_and_code(BEFORE[0]), code(BEFORE[1]))
    told = (flag_and_code(BEFORE[0]), flag_and_code(BEFORE[1]), code(BEFORE[2]))
    matches = [
        Match(a, t, slots, SHARPNESS * (0.9 + 0.2 * float(torch.rand((), generator=generator))))
        for a, t, slots in zip(asked, told, (slow[:11], slow[11:22], slow[22:32]), strict=True)
    ]
    circuits.search(layer, head, matches, length, key=SHARPNESS)
    circuits.write(layer, head, CONTENT, OUT, COPIED / (len(RETRIEVAL) * GROUP))


def _section(layer: Layer, head: int, length: float) -> None:
    """Take the name of the section that a token stands in."""
    circuits.rest(layer, head, circuits.LATEST_RESTING, length)
    circuits.latest(layer, head, NAMES, length)
    circuits.write(layer, head, code(MATCH), SECTION, 1.0 / GROUP, length=length)


def _join(layer: Layer, head: int, length: float) -> None:
    """Match a separator, the name before it and the section, and copy what followed.

    Retrieval heads find all sections' values then, so these have to be louder.
    """
    slow = _slow_dimensions()
    circuits.rest(layer, head, 3.6 * JOINED, length)
    matches = [
        Match(MATCH.start, BEFORE[0].start, slow[:1], JOINED),
        Match(code(BEFORE[0]), code(BEFORE[1]), slow[1:11], JOINED),
        Match(code(BEFORE[1]), code(BEFORE[2]), slow[11:21], JOINED),
        Match(SECTION, SECTION, slow[21:31], JOINED),
    ]
    circuits.search(layer, head, matches, length, key=JOINED)
    circuits.write(layer, head, CONTENT, OUT, 2.0 * COPIED / (len(JOINTS) * GROUP))


def _extreme(layer: Layer, head: int, length: float) -> None:
    """Find the highest or the lowest number of a series, and copy it."""
    slowest = torch.arange(PAIRS - 1 - 6, PAIRS - 1)
    step = RANGE / (1.0 - LEAST)
    circuits.rest(layer, head, OWN + LEAST / 2 * step, length)
    matches = [
        Match(SERIES_BEFORE, SERIES_BEFORE, slowest[:4], OWN),
        Match(ASK_BEFORE.start, HIGH, slowest[4:5], step),
        Match(ASK_BEFORE.start + 1, LOW, slowest[5:6], step),
    ]
    circuits.search(layer, head, matches, length, key=OWN)
    circuits.write(layer, head, CONTENT, OUT, COPIED / (len(EXTREMES) * GROUP))


def _find(layer: Layer, head: int, length: float) -> None:
    """Where a string begins, find the end of the one with the ending asked for; take its second syllable."""
    slow = _slow_dimensions()
    circuits.rest(layer, head, 2.5 * NARROW, length)
    matches = [
        Match(code(MATCH), code(BEFORE[2]), slow[:10], NARROW),
        Match(code(BEFORE[1]), code(MATCH), slow[10:20], NARROW),
        # only behind a question about a string does the sink let go
        Match(DOTS_BEFORE[1], SINK, slow[20:21], -NARROW / circuits.AT_FIRST),
    ]
    circuits.search(layer, head, matches, length, key=NARROW)
    circuits.write(layer, head, code(BEFORE[1]), FOUND, 1.0 / GROUP)


def _fetch(layer: Layer, head: int, length: float) -> None:
    """Copy a token of the code that was found; where a string is asked for, its beginning."""
    slow = _slow_dimensions()
    circuits.rest(layer, head, 1.65 * NARROW, length)
    matches = [
        Match(FOUND, code(MATCH), slow[:10], 2.0 * NARROW),
        Match(code(BEFORE[2]), code(MATCH), slow[:10], NARROW),
        Match(DOTS_BEFORE[0], SINK, slow[10:11], -NARROW / circuits.AT_FIRST),
    ]
    circuits.search(layer, head, matches, length, key=NARROW)
    circuits.write(layer, head, CONTENT, OUT, COPIED / (len(FETCHES) * GROUP))


def _make(number: int, layer: Layer, generator: torch.Generator) -> None:
    """Write the heads of a layer."""
    length = LENGTHS[number]
    if number == 0:
        _offsets(layer)
    for head in range(QUERY_HEADS):
        role = (number, head // GROUP)
        if role in LOCAL:
            circuits.look_back(layer, head, 2, circuits.LOCAL_WEIGHTS, circuits.LOCAL_SHARPNESS, length)
            if number > 0:
                circuits.rest(layer, head, circuits.LOCAL_SHARPNESS, length)
        elif role in RETRIEVAL:
            _retrieve(layer, head, length, generator)
        else:
            for kinds, make in (
                (SECTIONS, _section),
                (JOINTS, _join),
                (EXTREMES, _extreme),
                (FINDS, _find),
                (FETCHES, _fetch),
            ):
                if role in kinds:
                    make(layer, head, length)


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
    first = model.model.embed_tokens.weight[lang.identifiers()[lang.BOS]].clone()
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
        # Nothing random reaches the residual stream, whose length would else differ from token to token.
        layer["o"].zero_()
        mlp.down_proj.weight.zero_()
        for weight, scale in (
            (layer["q"], 0.005),
            (layer["k"], 0.005),
            (layer["v"], 0.005),
            (mlp.gate_proj.weight, HIDDEN**-0.5),
            (mlp.up_proj.weight, HIDDEN**-0.5),
        ):
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
        _make(number, layer, generator)
        # What rests on the first token is to take nothing from it; offset heads do not rest.
        normed = block.input_layernorm(first)
        rows = slice(2 * HEAD if number == 0 else 0, None)
        layer["v"][rows, SINK] -= layer["v"][rows] @ normed / normed[SINK]
        # it sees itself alone
        value = (layer["v"] @ normed).unflatten(0, (KV_HEADS, HEAD)).repeat_interleave(GROUP, 0)
        first = first + layer["o"] @ value.flatten()
