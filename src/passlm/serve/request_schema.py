"""What the API takes: requests of the OpenAI API, and which parts of them are refused.

Types, ranges and unknown names are checked here. What depends on the model or on the server's
limits is left to `requests.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _integer(value: object) -> object:
    """JSON has one kind of number: 16.0 is whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unicode(text: str) -> str:
    """JSON can name half a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("invalid_value", "is not valid Unicode text") from error
    return text


def printable(text: str) -> str:
    """A text that can be sent, whatever was in it."""
    return text.encode("utf-8", "replace").decode()


def _described_as(expected: str) -> WrapValidator:
    """One plain sentence in place of what each form that is allowed finds wrong."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError(
                "invalid_type", "must be {expected}", {"expected": expected}
            ) from error

    return WrapValidator(check)


def _only_false(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported_value", "is not supported by this server")
    return value


def _unsupported(value: object) -> object:
    if value is not None:
        raise PydanticCustomError(
            "unsupported_parameter", "is not supported by this server: leave it out"
        )
    return value


def _content(value: object) -> object:
    if not isinstance(value, str | list):
        raise PydanticCustomError("invalid_type", "must be a text or a list of parts of type text")
    return value


def _text_part(value: object) -> object:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("unsupported_value", "must be text: this server reads text only")
    return value


def _text_format(value: object) -> object:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_value", "must be of type text: this server writes free text only"
        )
    return value


_INTEGER = BeforeValidator(_integer)
Text: TypeAlias = Annotated[str, AfterValidator(_unicode)]
NonEmptyText: TypeAlias = Annotated[Text, Field(min_length=1)]
Positive: TypeAlias = Annotated[int, Field(ge=1), _INTEGER]
NotNegative: TypeAlias = Annotated[int, Field(ge=0), _INTEGER]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
Unsupported: TypeAlias = Annotated[None, BeforeValidator(_unsupported)]
OnlyFalse: TypeAlias = Annotated[
    bool, AfterValidator(_only_false), Field(json_schema_extra={"const": False})
]
LogitBias: TypeAlias = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"additionalProperties": False}),
]
# Lists may be long, and the first thing wrong is enough to know.
Ids: TypeAlias = Annotated[list[NotNegative], Field(min_length=1, fail_fast=True)]
Prompt: TypeAlias = Annotated[
    NonEmptyText
    | Annotated[list[NonEmptyText], Field(min_length=1, fail_fast=True)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, fail_fast=True)],
    _described_as("a text, a list of texts, token ids or a list of lists of token ids, none empty"),
]
Stop: TypeAlias = Annotated[
    NonEmptyText | Annotated[list[NonEmptyText], Field(fail_fast=True)] | None,
    _described_as("a text or a list of texts, none empty"),
]


class Body(BaseModel):
    """A part of a request; an unknown name in it is an error that names the nearest."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_names(cls, given: object) -> object:
        names = given if isinstance(given, Mapping) else {}
        for name in names:
            if name not in cls.model_fields:
                closest = difflib.get_close_matches(str(name), cls.model_fields, 1)
                hint = f"did you mean {closest[0]!r}?" if closest else "leave it out"
                raise PydanticCustomError(
                    "unknown_parameter",
                    "unknown parameter: {hint}",
                    {"field": printable(str(name)[:80]), "hint": hint},
                )
        return given


class StreamOptions(Body):
    """How a stream is told."""

    include_usage: bool | None = Field(
        default=None, description="One more event at the end tells the usage."
    )
    include_obfuscation: OnlyFalse | None = None


class LookAhead(Body):
    """How tokens are drafted; greedy and seeded text is the same under every method."""

    method: Literal["auto", "ar", "two-pass", "one-pass"] | None = Field(
        default=None, description="`ar` drafts nothing; `auto` (the default) what pays."
    )
    tokens: NotNegative | None = Field(
        default=None, description="Look-ahead steps; for `auto`, at most."
    )
    show: bool | None = Field(
        default=None,
        description="Tell in each streamed chunk how its tokens came. A chunk is a pass then.",
    )


class TextFormat(Body):
    """Free text, the only format that is written."""

    type: Literal["text"]


class CommonRequest(Body):
    """What both kinds of requests have in common."""

    model: Text
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = Field(
        default=None, description="Token id to a number that is added to its logit."
    )
    n: Positive | None = Field(
        default=None, description="Texts for each prompt; with a seed, seeds go on from it."
    )
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), _INTEGER] | None = Field(
        default=None, description="The same seed gives the same text."
    )
    stop: Stop = Field(default=None, description="The text ends before any of these.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="Default 1; 0 is greedy."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Text | None = Field(default=None, description="Has no effect.")
    top_k: NotNegative | None = Field(
        default=None, description="Draw from the k likeliest tokens only; 0 is all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Drop tokens below this share of the likeliest one."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        default=None, description="Above 1 makes tokens already in the text less likely."
    )
    lookahead: LookAhead | None = None


class CompletionRequest(CommonRequest):
    """A text, or several, to be continued."""

    prompt: Prompt
    best_of: Positive | None = Field(default=None, description="Must be equal to `n`.")
    echo: bool | None = Field(default=None, description="Give the prompt before its continuation.")
    logprobs: Annotated[int, Field(ge=0, le=5), _INTEGER] | None = Field(
        default=None, description="How many of the likeliest tokens to tell with each one."
    )
    max_tokens: Positive | None = Field(default=None, description="Default 16.")
    suffix: Unsupported = None


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


Part: TypeAlias = Annotated[TextPart, BeforeValidator(_text_part)]


class Message(Body):
    """What somebody said in a chat; which roles there are is the chat template's affair."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Text | Annotated[list[Part], Field(fail_fast=True)], BeforeValidator(_content)
    ]
    name: Text | None = None
    tool_call_id: Text | None = None
    refusal: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    annotations: Annotated[list[Text], Field(max_length=0)] | None = None


class ChatRequest(CommonRequest):
    """A chat to be answered."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), _INTEGER] | None = Field(
        default=None, description="How many of the likeliest tokens to tell with each one."
    )
    max_completion_tokens: Positive | None = None
    max_tokens: Positive | None = Field(
        default=None, description="The older name of `max_completion_tokens`."
    )
    response_format: Annotated[TextFormat, BeforeValidator(_text_format)] | None = None
    metadata: Annotated[dict[Text, Text], Field(max_length=16)] | None = Field(
        default=None, description="Has no effect."
    )
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    store: OnlyFalse | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = Field(default=None, description="Has no effect.")
    prompt_cache_key: Text | None = Field(
        default=None, description="Has no effect: prompts that begin alike are always found."
    )
    reasoning_effort: Literal["none"] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    tools: Unsupported = None
    functions: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
