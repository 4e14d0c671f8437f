"""How an embedding model makes one vector of a text, read from the layout of sentence-transformers.

``modules.json`` lists what comes after the decoder: a pooling (its folder has a ``config.json``) and,
perhaps, a normalisation. ``config_sentence_transformers.json`` names prompts to put before a text,
``sentence_bert_config.json`` the longest text. Whether vectors may be shortened (Matryoshka) stands in the
model's own ``config.json``, as ``is_matryoshka`` or ``matryoshka_dimensions``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import cached_file

from winnow.models.text import Text
from winnow.types import LanguageModel

__all__ = ["MODES", "Pool", "Pooling", "pooling_of", "read_pooling"]

# By the flags of older files, in the order in which several are joined.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODES = tuple(_FLAGS.values())


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """From the hidden states of a text to one vector.

    Attributes
    ----------
    modes : tuple of str
        Of :data:`MODES`; the vectors of several are joined.
    width : int
        ``K``, of the hidden states.
    normalise : bool
        Whether vectors have length 1.
    shorter : range or tuple of int
        Dimensions to which a vector may be cut.
    prompts : mapping of str to str
        Texts that may be put before a text, by name.
    default_prompt : str or None
        Name of the one that is put before a text that asks for none.
    include_prompt : bool
        Whether the tokens of a prompt are pooled too.
    longest : int or None
        Most tokens of a text; None leaves it to the model.

    Raises
    ------
    ValueError
        An unknown mode, or a default prompt that is not there.
    """

    modes: tuple[str, ...]
    width: int
    normalise: bool = False
    shorter: range | tuple[int, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    include_prompt: bool = True
    longest: int | None = None

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"unknown pooling {mode!r}; choose {', '.join(MODES)}")
        if not self.modes:
            raise ValueError(f"a pooling needs a mode; choose {', '.join(MODES)}")
        if self.default_prompt is not None:
            self.prompt(self.default_prompt)

    @property
    def dimensions(self) -> int:
        """``E``, of a whole vector."""
        return len(self.modes) * self.width

    def prompt(self, name: str | None) -> str:
        """The prompt of that name; of no name the default one."""
        if name is None:
            name = self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"this model has no prompt {name!r}; there are: {known}")
        return self.prompts[name]

    def tokens(
        self, text: str | Sequence[int], prompt_name: str | None, words: Callable[[], Text]
    ) -> tuple[list[int], int]:
        """Token ids of a text and its prompt, and how many of them are not pooled.

        Parameters
        ----------
        text : str or sequence of int
            Token ids pass through, without a prompt.
        prompt_name : str or None
            None is the default one.
        words : callable
            Gives the tokenizer where it is needed.

        Raises
        ------
        ValueError
            An unknown prompt, or one for token ids.
        """
        if not isinstance(text, str):
            if prompt_name is not None:
                raise ValueError("a prompt stands before text; put its tokens before the token ids yourself")
            return list(text), 0
        prompt, known = self.prompt(prompt_name), words()
        ids = known.encode(prompt + text)
        if self.include_prompt or not prompt:
            return ids, 0
        alone = known.encode(prompt)
        # What a tokenizer puts at the end stands after the text, not after the prompt.
        return ids, len(alone) - (alone[-1] in known.tokenizer.all_special_ids)

    def start(self, tokens: int, skip: int = 0, dimensions: int | None = None) -> Pool:
        """What takes the hidden states of one text.

        Parameters
        ----------
        tokens : int
            Of the text.
        skip : int
            Leading tokens that are not pooled.
        dimensions : int or None
            Of the result; None is all.

        Raises
        ------
        ValueError
            Nothing to pool, too long a text, or a vector that cannot be cut like that.
        """
        if tokens <= skip:
            raise ValueError("the text is empty; give at least one token")
        if self.longest is not None and tokens > self.longest:
            raise ValueError(
                f"this model embeds texts of at most {self.longest} tokens, this one has {tokens}; divide it"
            )
        if dimensions is None:
            dimensions = self.dimensions
        self.check_dimensions(dimensions)
        return Pool(self, skip, dimensions)

    def check_dimensions(self, dimensions: int) -> None:
        """Refuse a length to which the model's vectors cannot be cut."""
        if dimensions == self.dimensions or dimensions in self.shorter:
            return
        if isinstance(self.shorter, range):
            can = f"but to {self.shorter[0]} up to {self.shorter[-1]}"
        elif self.shorter:
            can = f"but to {', '.join(map(str, self.shorter))}"
        else:
            can = "its configuration says nothing of is_matryoshka or matryoshka_dimensions"
        raise ValueError(
            f"the {self.dimensions} dimensions of this model cannot be cut to {dimensions}: {can}"
        )


class Pool:
    """Takes the hidden states of one text, chunk by chunk; made by :meth:`Pooling.start`."""

    def __init__(self, pooling: Pooling, skip: int, dimensions: int) -> None:
        self._pooling = pooling
        self._skip = skip
        self._dimensions = dimensions
        self._seen = 0
        self._weight = 0
        self._first_K = torch.empty(0)
        self._last_K = torch.empty(0)
        self._max_K = torch.full((pooling.width,), -torch.inf)
        self._sum_K = torch.zeros(pooling.width)
        self._weighted_K = torch.zeros(pooling.width)

    def take(self, hidden_NK: Tensor) -> None:
        """The next ``[N, K]`` hidden states after the final norm, in any dtype and on any device."""
        before, self._seen = self._seen, self._seen + len(hidden_NK)
        rows_NK = hidden_NK[max(self._skip - before, 0) :].float()
        if not len(rows_NK):
            return
        # The weighted mean counts from the beginning of the text, tokens that are not pooled included.
        places = range(self._seen - len(rows_NK) + 1, self._seen + 1)
        weights_N = torch.tensor(places, dtype=torch.float32, device=rows_NK.device)
        if not self._weight:
            self._first_K = rows_NK[0].cpu()
        self._last_K = rows_NK[-1].cpu()
        self._max_K = torch.maximum(self._max_K, rows_NK.amax(0).cpu())
        self._sum_K += rows_NK.sum(0).cpu()
        self._weighted_K += (weights_N @ rows_NK).cpu()
        self._weight += sum(places)

    def result(self) -> Tensor:
        """``[E]`` float32 on the CPU, cut and normalised."""
        count = self._seen - self._skip
        assert count > 0, "a text without a token to pool"
        by_mode = {
            "cls": self._first_K,
            "max": self._max_K,
            "mean": self._sum_K / count,
            "mean_sqrt_len_tokens": self._sum_K / count**0.5,
            "weightedmean": self._weighted_K / self._weight,
            "lasttoken": self._last_K,
        }
        vector_E = torch.cat([by_mode[mode] for mode in self._pooling.modes])[: self._dimensions]
        return functional.normalize(vector_E, dim=0) if self._pooling.normalise else vector_E.clone()


def pooling_of(model: LanguageModel) -> Pooling:
    """The pooling of a loaded model.

    Raises
    ------
    ValueError
        It has none, with the reason.
    """
    found = getattr(model, "pooling", "its layers were transformed; load it without swiftkv")
    if isinstance(found, Pooling):
        return found
    raise ValueError(f"{model.name} does not embed texts: {found}")


def read_pooling(source: str, config: Any, *, offline: bool) -> Pooling:
    """The pooling that comes with a model.

    Parameters
    ----------
    source : str
        Directory or hub name.
    config : transformers.PreTrainedConfig
    offline : bool
        Use no network.

    Raises
    ------
    ValueError
        There is none, or it is none that is supported; the reason without a remedy.
    """

    def read(name: str) -> Any:
        try:
            found = cached_file(
                source,
                name,
                local_files_only=offline,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_connection_errors=False,
            )
            return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"its {name} cannot be read ({error})") from error

    modules = read("modules.json")
    if modules is None:
        raise ValueError("it comes without modules.json, so it is no embedding model")
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"its modules are {', '.join(kinds)}, not Transformer, Pooling and perhaps Normalize"
        )
    pooled = read(f"{modules[1]['path']}/config.json")
    if pooled is None:
        raise ValueError(f"{modules[1]['path']}/config.json of its pooling is missing")
    about = read("config_sentence_transformers.json") or {}
    texts = read("sentence_bert_config.json") or {}
    if texts.get("do_lower_case"):
        raise ValueError("it wants its texts in lower case")
    text_config = config.get_text_config(decoder=True)
    modes, width = _modes(pooled), int(text_config.hidden_size)
    return Pooling(
        modes=modes,
        width=width,
        normalise="Normalize" in kinds,
        shorter=_shorter(text_config, len(modes) * width),
        prompts=dict(about.get("prompts") or {}),
        default_prompt=about.get("default_prompt_name"),
        include_prompt=bool(pooled.get("include_prompt", True)),
        longest=texts.get("max_seq_length"),
    )


def _modes(pooled: Mapping[str, Any]) -> tuple[str, ...]:
    """Modes of a pooling's configuration, in its newer or its older form."""
    newer = pooled.get("pooling_mode")
    if newer is not None:
        return (newer,) if isinstance(newer, str) else tuple(newer)
    return tuple(mode for flag, mode in _FLAGS.items() if pooled.get(flag)) or ("mean",)


def _shorter(config: Any, dimensions: int) -> range | tuple[int, ...]:
    if listed := getattr(config, "matryoshka_dimensions", None):
        return tuple(sorted(int(one) for one in listed if 0 < one < dimensions))
    return range(1, dimensions) if getattr(config, "is_matryoshka", False) else ()
