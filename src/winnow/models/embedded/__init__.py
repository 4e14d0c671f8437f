"""The embedded model: a small Llama that ships with Winnow and really uses its context.

`path` gives a directory that ``transformers.AutoModelForCausalLM.from_pretrained`` and
``AutoTokenizer.from_pretrained`` read.  `documents` generates, from a seed, documents and
turns of questions that this model can answer; `language` defines its vocabulary.
``python -m winnow.models.train_embedded`` rebuilds the weights.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Directory of the weights, the configuration and the tokenizer."""
    return Path(__file__).parent / "weights"
