"""The general runner: any decoder-only model of `transformers` that uses its attention interface."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnow.models.interface import NAME, attending
from winnow.models.linear import use_native_products
from winnow.models.pooling import Pooling
from winnow.models.refuse import check_config, check_model, probe
from winnow.models.rotary import position_limit, use_long_regime
from winnow.models.turning import find_rotary, tables
from winnow.models.walk import GeneralWalk, check_walk
from winnow.models.weights import fingerprint
from winnow.types import Attend, LayerWalk, Rotary

__all__ = ["HFModel"]


class HFModel:
    """Drives a model's own ``forward`` without a cache, on packed tokens with explicit positions.

    The model given is left as it is: Winnow runs a twin with its own modules and configuration whose
    parameters *are* the original's, so nothing is copied and later changes of a weight are seen.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model on one device.
    name : str or None
        For messages; the configuration's name by default.
    long_positions : bool
        Run a longrope model on the frequencies of long prompts throughout (see
        :func:`winnow.models.rotary.use_long_regime`), so that it takes its full length.
    pooling : Pooling or str
        How the model embeds texts, or why it does not.
    generates : bool
        False where the head is none of the model's own.

    Raises
    ------
    ValueError
        If the model is not supported, or its weights hold NaN.

    Notes
    -----
    Satisfies :class:`winnow.types.LanguageModel`, which lists the attributes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str | None = None,
        long_positions: bool = False,
        pooling: Pooling | str = "it was made in memory",
        generates: bool = True,
    ) -> None:
        check_config(model.config)
        check_model(model)
        self.name: str = name or model.config.name_or_path or model.config.model_type
        self.fingerprint = fingerprint(model, self.name)
        self._model = _twin(model)
        if long_positions:
            use_long_regime(self._model)
            self.fingerprint += "-long"  # keys of the two regimes must not meet in a pool either
        self._takes_rows = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        facts = probe(self._model)
        config = model.config.get_text_config(decoder=True)
        self.model_type: str = model.config.model_type
        self.layers = facts.layers
        self.kv_heads = facts.kv_heads
        self.query_heads = facts.query_heads
        self.head_dim = facts.head_dim
        self.vocab_size = facts.vocab_size
        self.specs = facts.specs
        self.slots = tuple(range(facts.layers))
        self.max_length = position_limit(config, long_positions=long_positions)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.eos_token_ids = _eos(model)
        self.pooling = pooling
        self.generates = generates
        self._walk: GeneralWalk | None = None
        self._rotary: list[Rotary | None] | None = None

    @property
    def module(self) -> PreTrainedModel:
        """The twin that runs: its parameters are the user's, its attention is Winnow's."""
        return self._model

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        attend: Attend,
        read: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`winnow.types.LanguageModel.forward`."""
        rows = rows.to(self.device)
        keep: dict[str, Any] = {"logits_to_keep": rows} if self._takes_rows else {}
        with attending(attend):
            logits: Tensor = self._model(
                input_ids=token_ids.to(self.device)[None],
                position_ids=position_ids.to(self.device)[None],
                use_cache=False,
                **keep,
            ).logits[0]
        return (logits if self._takes_rows else logits[rows]).float()

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """See :meth:`winnow.engine.embedding.GivesHidden.hidden`."""
        with attending(attend):
            states: Tensor = self._model.base_model(
                input_ids=token_ids.to(self.device)[None],
                position_ids=position_ids.to(self.device)[None],
                use_cache=False,
            ).last_hidden_state
        return states[0]

    def walk(self) -> LayerWalk:
        """See :meth:`winnow.types.LanguageModel.walk`; made and checked at the first call."""
        if self._walk is None:
            walk = GeneralWalk(self._model, self.layers)
            check_walk(walk, self, self.model_type)
            self._walk = walk
        return self._walk

    def rotary(self, layer: int) -> Rotary | None:
        """See :meth:`winnow.types.LanguageModel.rotary`; found out at the first call."""
        if self._rotary is None:
            self._rotary = find_rotary(
                self.walk(),
                tables(self._model),
                layers=self.layers,
                head_dim=self.head_dim,
                max_length=self.max_length,
                dtype=self.dtype,
                name=self.model_type,
            )
        return self._rotary[layer]


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules and the configuration around the same parameters, for inference.

    Buffers are copied: some rotary modules write into theirs.
    """
    if len({p.device for p in model.parameters()}) != 1:
        raise ValueError("the model is spread over several devices; load it on one (device_map=None)")
    shared = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, shared).eval()
    twin.set_attn_implementation(NAME)
    use_native_products(twin)
    return twin


def _eos(model: PreTrainedModel) -> tuple[int, ...]:
    """End-of-sequence tokens of the generation configuration, else of the model's."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if eos is None:
        return ()
    return (int(eos),) if isinstance(eos, int) else tuple(int(e) for e in eos)
