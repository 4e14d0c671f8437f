"""The embedded model's shape, and what the parts of its residual stream hold at the start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from winnow.models.embedded import language as lang

if TYPE_CHECKING:
    from transformers import LlamaConfig

HIDDEN, LAYERS, QUERY_HEADS, KV_HEADS, HEAD, MLP = 256, 6, 8, 4, 64, 256
GROUP = QUERY_HEADS // KV_HEADS
PAIRS = HEAD // 2
THETA = 1e10

FLAG = 1  # length of the separator flag
BITS = 10  # length of a match code
_CODED = FLAG + BITS + 1  # the last makes flag and code together 1 long
CONTENT = slice(0, 64)
OUT = slice(64, 128)
MATCH = slice(128, 128 + _CODED)
BEFORE = tuple(slice(128 + _CODED * o, 128 + _CODED * (o + 1)) for o in (1, 2, 3))
CONSTANT, SINK, BALLAST = 176, 177, 178
#: of a token: which extreme it asks for, which series it names, whether it names a section or is the
#: dots between a beginning and an ending
ASK, SERIES, NAMES, DOTS = slice(179, 181), slice(181, 185), 185, 186
#: of a number: how high and how low it is
HIGH, LOW = 187, 188
#: the same of the token before, of the one two before, and of those two and three before
SERIES_BEFORE, ASK_BEFORE, DOTS_BEFORE = slice(189, 193), slice(193, 195), (195, 196)
#: the code of the name of the section that a token stands in
SECTION = slice(197, 207)
#: the code of a token that a search has found; what follows is free
FOUND = slice(207, 217)

LENGTH = math.sqrt(7.5)  # of every embedding
SHARED = 1.5  # of its constant part
#: how long the residual stream is where a layer begins, while a head retrieves
LENGTHS = (LENGTH, 3.3, 3.4, 3.8, 4.2, 4.6)


def code(part: slice) -> slice:
    """The code alone of a part that holds flag and code."""
    return slice(part.start + FLAG, part.start + FLAG + BITS)


def flag_and_code(part: slice) -> slice:
    """Flag and code, without what makes them 1 long."""
    return slice(part.start, part.start + FLAG + BITS)


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
