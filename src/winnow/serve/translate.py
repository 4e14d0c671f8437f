"""From a checked body to tokens, sampling parameters and steering."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.chunks import Chunks, divide, split
from winnow.engine.repair import Division
from winnow.engine.request import SamplingParams
from winnow.engine.steer import Steer
from winnow.models.pooling import Pooling
from winnow.models.text import Text
from winnow.retrieval.protocol import reuses_chunks
from winnow.serve import tools
from winnow.serve.config import Settings
from winnow.serve.errors import ApiError
from winnow.serve.grammar import Grammars
from winnow.serve.schema import ChatRequest, CompletionRequest, Message
from winnow.serve.steer import Bias, Penalties, chain
from winnow.types import LanguageModel

__all__ = ["Asked", "Translator"]

_MAX_PROMPTS = 64
_DEFAULT_ANSWER = 16  # of a completion whose max_tokens is null, as OpenAI has it


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a body asks of the engine: one or several prompts under the same parameters."""

    prompts: list[list[int]]
    divisions: list[Division | None]
    params: SamplingParams
    steer: Callable[[], Steer] | None
    recipe: str


class Translator:
    """Knows the model's words; any thread may use it.

    Parameters
    ----------
    settings : Settings
    model : LanguageModel
    text : Text or None
        None serves token ids only.
    """

    def __init__(self, settings: Settings, model: LanguageModel, text: Text | None) -> None:
        self._settings = settings
        self._model = model
        # The worker decodes with the original while requests are encoded here: a fast tokenizer
        # refuses to be read while it is being configured for an encoding.
        self._text = None if text is None else Text(copy.deepcopy(text.tokenizer))
        self._lock = threading.Lock()
        self._grammars: Grammars | None = None

    @property
    def template(self) -> str:
        """The model's chat template; empty where it has none."""
        return "" if self._text is None else str(self._text.tokenizer.chat_template or "")

    # ------------------------------------------------------------------ text

    def _words(self) -> Text:
        if self._text is None:
            raise ApiError(400, "this model came without a tokenizer; send token ids to /v1/completions")
        return self._text

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text."""
        words = self._words()
        with self._lock:
            return words.encode(text, special=special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        self.check_tokens(tokens)
        words = self._words()
        with self._lock:
            return words.decode(tokens)

    def token_text(self, token: int) -> str:
        """What one token stands for, special ones by name."""
        if self._text is None:
            return f"token_id:{token}"
        with self._lock:
            return str(self._text.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def conversation(self, messages: Sequence[Message], request: ChatRequest | None = None) -> list[int]:
        """Token ids of a conversation under the model's own chat template.

        Raises
        ------
        ApiError
            400 where there is no template, or it refuses these messages.
        """
        words = self._words()
        shown = None
        if request is not None and request.tools and request.tool_choice != "none":
            shown = [tool.model_dump(exclude_none=True) for tool in request.tools]
        try:
            with self._lock:
                return words.chat([_plain(message) for message in messages], tools=shown)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ApiError(
                400, f"the conversation does not fit the model's template: {error}", param="messages"
            ) from error

    def pooled(
        self, pooling: Pooling, text: str | list[int], prompt_name: str | None
    ) -> tuple[list[int], int]:
        """See :meth:`winnow.models.pooling.Pooling.tokens`."""
        with self._lock:
            return pooling.tokens(text, prompt_name, self._words)

    def check_tokens(self, tokens: Sequence[int], *, param: str = "prompt") -> None:
        """Refuse ids outside the vocabulary."""
        if tokens and max(tokens) >= self._model.vocab_size:
            raise ApiError(
                400, f"a token id lies outside the vocabulary of {self._model.vocab_size}", param=param
            )

    # ------------------------------------------------------------------ requests

    def completion(self, request: CompletionRequest) -> Asked:
        """What a completion asks for."""
        self._check_generates()
        if request.suffix:
            raise ApiError(400, "suffix is not supported; put all context into the prompt", param="suffix")
        if request.best_of not in (None, request.n):
            raise ApiError(400, "best_of must equal n; every sample is returned", param="best_of")
        if request.echo and request.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not supported; ask for one of them", param="echo")
        recipe = self._recipe(request)
        given = self._prompts(request.prompt, recipe)
        prompts = [tokens for tokens, _ in given]
        wanted = request.max_tokens if "max_tokens" in request.model_fields_set else None
        room = self._settings.max_model_len - max(map(len, prompts))
        most = self._answer(prompts, wanted, min(_DEFAULT_ANSWER, max(room, 1)))
        params = self._params(request, most, request.logprobs)
        return Asked(
            prompts=prompts,
            divisions=[division for _, division in given],
            params=params,
            steer=chain(self._bends(request)),
            recipe=recipe,
        )

    def chat(self, request: ChatRequest) -> Asked:
        """What a chat completion asks for."""
        self._check_generates()
        wanted = request.max_completion_tokens or request.max_tokens
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        self._check_tools(request)
        prompts = [self.conversation(request.messages, request)]
        most = self._answer(prompts, wanted, max(self._settings.max_model_len - len(prompts[0]), 1))
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        params = self._params(request, most, logprobs)
        bends = [*self._bends(request), *self._form(request)]
        recipe = self._recipe(request)
        return Asked(prompts=prompts, divisions=[None], params=params, steer=chain(bends), recipe=recipe)

    def _check_generates(self) -> None:
        if not self._model.generates:
            raise ApiError(
                400,
                "this model embeds texts and generates none; use /v1/embeddings",
                param="model",
                code="model_not_supported",
            )

    def _prompts(
        self, prompt: str | list[int] | list[str] | list[list[int]], recipe: str
    ) -> list[tuple[list[int], Division | None]]:
        if not isinstance(prompt, str) and not prompt:
            raise ApiError(400, "the prompt is empty; give at least one token", param="prompt")
        alone = isinstance(prompt, str) or isinstance(prompt[0], int)
        several: Sequence[Any] = [prompt] if alone else prompt
        if len(several) > _MAX_PROMPTS:
            raise ApiError(400, f"more than {_MAX_PROMPTS} prompts in one request", param="prompt")
        found = [self._divided(one, recipe) if isinstance(one, str) else (list(one), None) for one in several]
        for tokens, _ in found:
            if not tokens:
                raise ApiError(400, "a prompt is empty; give at least one token", param="prompt")
            self.check_tokens(tokens)
        return found

    def _divided(self, text: str, recipe: str) -> tuple[list[int], Division | None]:
        """A text in tokens, and in chunks where the recipe reuses them and says what parts them."""
        part = self._settings.recipes[recipe].retrieval
        if part is not None and reuses_chunks(part) and part.separator is not None:
            parted = split(text, part.separator)
            if isinstance(parted, Chunks):
                words = self._words()
                with self._lock:
                    return divide(parted, words)
        return self.encode(text), None

    def _answer(self, prompts: list[list[int]], wanted: int | None, default: int) -> int:
        limit, longest = self._settings.max_model_len, max(map(len, prompts))
        if longest >= limit or (wanted is not None and longest + wanted > limit):
            asked = "" if wanted is None else f" and asks for {wanted} more"
            raise ApiError(
                400,
                f"this model's maximum context length is {limit} tokens; the prompt has {longest}{asked}. "
                "Shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
                param="prompt" if longest >= limit else "max_tokens",
            )
        return default if wanted is None else wanted

    def _params(
        self, request: ChatRequest | CompletionRequest, most: int, logprobs: int | None
    ) -> SamplingParams:
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        settings = self._settings
        limits = (
            ("n", request.n, settings.max_n),
            ("stop", len(stop), settings.max_stop),
            ("logprobs", logprobs or 0, settings.max_logprobs),
        )
        for name, have, limit in limits:
            if have > limit:
                raise ApiError(400, f"{name} is at most {limit} here, not {have}", param=name)
        if stop and self._text is None:
            raise ApiError(400, "stop strings need a tokenizer, which this model lacks", param="stop")
        if any(not 1 <= len(one) <= 1024 for one in stop):
            raise ApiError(400, "a stop string has 1 to 1024 characters", param="stop")
        try:
            return SamplingParams(
                max_new_tokens=most,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                seed=request.seed,
                stop=stop,
                ignore_eos=request.ignore_eos,
                n=request.n,
                logprobs=logprobs,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def _bends(self, request: ChatRequest | CompletionRequest) -> list[Callable[[], Steer]]:
        bends: list[Callable[[], Steer]] = []
        if request.logit_bias:
            by_token: dict[int, float] = {}
            for name, value in request.logit_bias.items():
                # Ten digits: a longer number is no token, and Python refuses to read one of thousands.
                if not re.fullmatch("[0-9]{1,10}", name) or int(name) >= self._model.vocab_size:
                    raise ApiError(400, f"logit_bias: {name[:40]!r} is no token id", param="logit_bias")
                by_token[int(name)] = value
            bends.append(lambda: Bias(by_token))
        presence, frequency = request.presence_penalty, request.frequency_penalty
        if presence or frequency:
            bends.append(lambda: Penalties(presence, frequency))
        return bends

    def _recipe(self, request: ChatRequest | CompletionRequest) -> str:
        name = request.recipe or self._settings.default_recipe
        if name not in self._settings.recipes:
            known = ", ".join(self._settings.recipes)
            raise ApiError(400, f"the recipe {name!r} is not served; there are {known}", param="recipe")
        return name

    # ------------------------------------------------------------------ form of the answer

    def _check_tools(self, request: ChatRequest) -> None:
        if request.tool_choice not in (None, "none", "auto"):
            if not request.tools:
                raise ApiError(400, "tool_choice demands a call; give tools", param="tool_choice")
            if not tools.demanded(request):
                raise ApiError(400, "tool_choice names a function that is not in tools", param="tool_choice")
            if request.response_format is not None and request.response_format.type != "text":
                raise ApiError(400, "a demanded call leaves no room for response_format", param="tool_choice")

    def _form(self, request: ChatRequest) -> list[Callable[[], Steer]]:
        wanted, form = tools.demanded(request), request.response_format
        if wanted is None and (form is None or form.type == "text"):
            return []
        if request.ignore_eos:
            raise ApiError(400, "an answer of a given form must be able to end", param="ignore_eos")
        if wanted is not None:
            return [self._grammar().json_schema(tools.schema_of(wanted), "tools")]
        assert form is not None
        if form.type == "json_object":
            return [self._grammar().json_object()]
        if form.json_schema is None:
            raise ApiError(400, "json_schema is missing in response_format", param="response_format")
        return [self._grammar().json_schema(form.json_schema.schema_, "response_format")]

    def _grammar(self) -> Grammars:
        words = self._words()
        with self._lock:
            if self._grammars is None:
                try:
                    self._grammars = Grammars(words, self._model.vocab_size, self._model.eos_token_ids)
                except ValueError as error:
                    raise ApiError(400, str(error), param="response_format") from error
            return self._grammars


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text content, arguments as objects."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and not message.tool_calls:
        raise ValueError("a message has neither content nor tool calls")
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
