"""Bodies of requests, as OpenAI's clients send them, with the fields that Winnow adds.

A field that is not known is refused, not ignored: an answer that silently lacks what was asked for
is worse than an error. Fields that OpenAI's service only books (``metadata``, ``store``, ...) are taken.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "Message",
    "ResponseFormat",
    "StreamOptions",
    "TokenizeRequest",
    "Tool",
    "ToolChoice",
]

# Far above any vocabulary: what is too large is refused with the model's own limit in the message.
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Body(_Strict):
    """A whole body."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, data: Any) -> Any:
        # JSON can spell half a surrogate pair. It is no character: nothing could encode it, not even
        # the answer that repeats it.
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise ValueError("the body holds half a surrogate pair, or is nested too deeply") from error
        if not isinstance(data, dict):
            return data
        # A field that is null asks for its default, as OpenAI has it.
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(_Strict):
    """What a stream carries besides its text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # asks for noise against eavesdroppers; none is added


class _Common(_Body):
    """What completions and chat completions share."""

    model: str = Field(max_length=512)
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    user: str | None = Field(None, max_length=512)
    # Winnow's own
    top_k: int = Field(0, ge=0, lt=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    ignore_eos: bool = False
    cache_salt: str = Field("", max_length=512)
    priority: int = Field(0, ge=-1000, le=1000)
    recipe: str | None = Field(None, max_length=512)
    # Booked by OpenAI's service, without a meaning here
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(_Common):
    """``POST /v1/completions``."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = Field(16, ge=1, lt=1 << 31)
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    best_of: int | None = Field(None, ge=1)
    suffix: str | None = None


class TextPart(_Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(_Strict):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A tool call that an assistant message made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(BaseModel):
    """One message of a conversation."""

    # Clients give an answer back as they got it, with fields (refusal, annotations, ...) that are null.
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_nothing_else(self) -> Message:
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"a message's {name[:40]!r} is not supported; leave it out")
        return self


class Function(_Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    """The name of a function."""

    name: str


class ToolChoice(_Strict):
    """Demands one function."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """A schema for the answer."""

    # "schema" is a method of pydantic's models.
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str = Field(max_length=512)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Common):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingRequest(_Body):
    """``POST /v1/embeddings``."""

    model: str = Field(max_length=512)
    input: str | list[TokenId] | list[str] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, lt=1 << 31)
    user: str | None = Field(None, max_length=512)
    # Winnow's own
    prompt_name: str | None = Field(None, max_length=512)
    priority: int = Field(0, ge=-1000, le=1000)


class TokenizeRequest(_Body):
    """``POST /tokenize``: of a text, or of a conversation."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True


class DetokenizeRequest(_Body):
    """``POST /detokenize``."""

    model: str | None = Field(None, max_length=512)
    tokens: list[TokenId]
