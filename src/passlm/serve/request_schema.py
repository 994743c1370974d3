"""Requests of the OpenAI API, with the fields that this server adds or does not support.

Checks types, ranges and unknown names. Checks that depend on the model or on the server's limits
are left to `requests.py`.
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
    """Accept 16.0 as an integer: JSON has only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unicode(text: str) -> str:
    """Reject lone surrogates, which JSON can express but Unicode text cannot contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("invalid_value", "is not valid Unicode text") from error
    return text


def printable(text: str) -> str:
    """Return a text with lone surrogates replaced, so that it can be sent."""
    return text.encode("utf-8", "replace").decode()


def _described_as(expected: str) -> WrapValidator:
    """Report one error that names the expected types, in place of one per allowed type."""

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
        raise PydanticCustomError(
            "invalid_type", "must be a string or a list of parts of type text"
        )
    return value


def _text_part(value: object) -> object:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_value", "must be of type text: other types are not supported"
        )
    return value


def _text_format(value: object) -> object:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_value", "must be of type text: other formats are not supported"
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
# Lists may be long, so validation stops at the first error (fail_fast).
Ids: TypeAlias = Annotated[list[NotNegative], Field(min_length=1, fail_fast=True)]
Prompt: TypeAlias = Annotated[
    NonEmptyText
    | Annotated[list[NonEmptyText], Field(min_length=1, fail_fast=True)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, fail_fast=True)],
    _described_as(
        "a string, a list of strings, a list of token ids or a list of lists of token ids, "
        "none of them empty"
    ),
]
Stop: TypeAlias = Annotated[
    NonEmptyText | Annotated[list[NonEmptyText], Field(fail_fast=True)] | None,
    _described_as("a string or a list of strings, none of them empty"),
]


class Body(BaseModel):
    """A part of a request; an unknown field is an error that names the closest field."""

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
    """Options of a stream."""

    include_usage: bool | None = Field(
        default=None, description="Send one more chunk at the end, with the usage."
    )
    include_obfuscation: OnlyFalse | None = None


class LookAhead(Body):
    """How tokens are drafted; greedy and seeded output is the same with every method."""

    method: Literal["auto", "ar", "two-pass", "one-pass"] | None = Field(
        default=None,
        description="`ar` does not draft; `auto` (the default) chooses the fastest plan.",
    )
    tokens: NotNegative | None = Field(
        default=None, description="Number of look-ahead steps; for `auto` the maximum."
    )
    show: bool | None = Field(
        default=None,
        description="Add to each streamed chunk how its tokens were obtained; one chunk per pass.",
    )


class TextFormat(Body):
    """Free text, the only supported format."""

    type: Literal["text"]


class CommonRequest(Body):
    """Fields that completion and chat requests share."""

    model: Text
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = Field(
        default=None, description="Map from token id to a number that is added to its logit."
    )
    n: Positive | None = Field(
        default=None, description="Choices per prompt; their seeds are `seed`, `seed` + 1, ..."
    )
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), _INTEGER] | None = Field(
        default=None, description="The same seed gives the same output."
    )
    stop: Stop = Field(
        default=None, description="Stop strings: the output ends before the first of them."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="Default 1; 0 is greedy."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Text | None = Field(default=None, description="Has no effect.")
    top_k: NotNegative | None = Field(
        default=None, description="Sample from the k most probable tokens only; 0 for all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Drop tokens whose probability is below this fraction of the highest one.",
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        default=None, description="Values above 1 make tokens that occurred before less probable."
    )
    lookahead: LookAhead | None = None


class CompletionRequest(CommonRequest):
    """One or several prompts to complete."""

    prompt: Prompt
    best_of: Positive | None = Field(default=None, description="Must be equal to `n`.")
    echo: bool | None = Field(default=None, description="Return the prompt before its completion.")
    logprobs: Annotated[int, Field(ge=0, le=5), _INTEGER] | None = Field(
        default=None, description="Number of most probable tokens to return with each token."
    )
    max_tokens: Positive | None = Field(default=None, description="Default 16.")
    suffix: Unsupported = None


class TextPart(Body):
    """A text part of a message."""

    type: Literal["text"]
    text: Text


Part: TypeAlias = Annotated[TextPart, BeforeValidator(_text_part)]


class Message(Body):
    """A message of a chat; which roles are supported depends on the chat template."""

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
    """A chat to answer."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), _INTEGER] | None = Field(
        default=None, description="Number of most probable tokens to return with each token."
    )
    max_completion_tokens: Positive | None = None
    max_tokens: Positive | None = Field(
        default=None, description="Older name of `max_completion_tokens`."
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
        default=None, description="Has no effect: common prefixes of prompts are always cached."
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
