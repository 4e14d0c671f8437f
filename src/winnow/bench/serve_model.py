"""A model directory for load tests: random weights of a real shape, and words that are tokens.

The text that a random model writes must survive the way back as part of the next prompt, token by
token, or no server could reuse it. So token ``i`` is the word ``wi``, and words are parted by spaces.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from winnow.models.random import PRESETS, random_model

__all__ = ["words", "write_model"]

_ROLES = ("system", "user", "assistant")
_UNKNOWN = "<unk>"  # a special token is found inside words too, so none may look like one
_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_model(directory: Path, preset: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write weights, tokenizer and chat template to ``directory``.

    Parameters
    ----------
    directory : Path
    preset : {"1b", "tiny"}
    seed : int
    dtype : torch.dtype
    """
    directory.mkdir(parents=True, exist_ok=True)
    random_model(preset, seed=seed, dtype=dtype).save_pretrained(directory)
    size = PRESETS[preset]["vocab_size"]
    first = [_UNKNOWN, *(f"<{role}>" for role in _ROLES)]
    vocabulary = {word: i for i, word in enumerate([*first, *(f"w{i}" for i in range(len(first), size))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": PRESETS[preset]["max_position_embeddings"],
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "unk_token": _UNKNOWN,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def words(count: int, vocabulary: int, dice: random.Random) -> str:
    """So many random words, which are so many tokens."""
    return " ".join(f"w{dice.randrange(16, vocabulary)}" for _ in range(count))
