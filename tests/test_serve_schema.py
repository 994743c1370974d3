"""Requests of the API: what is taken, what is refused and how, and what the worker is asked."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from byte_model import byte_generator
from fastapi.exceptions import RequestValidationError
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from passlm.errors import InputError
from passlm.generate import Generator
from passlm.serve.errors import ApiError, from_http, from_input_error, from_validation
from passlm.serve.request_schema import ChatRequest, CompletionRequest
from passlm.serve.requests import GenerationRequest, RequestReader
from passlm.serve.settings import ServeSettings, SettingsError

NAME = "bytes"
CHAT: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"model": NAME, "prompt": "hello"}
LIMITS = ServeSettings(
    model_name=NAME, max_tokens=50, max_texts=6, max_stops=3, max_logit_bias=2, max_prompt_tokens=40
)


@pytest.fixture(scope="module")
def lm() -> Generator:
    return byte_generator()


@pytest.fixture(scope="module")
def reader(lm: Generator) -> RequestReader:
    return RequestReader(lm, LIMITS, max_context=192)


def fault(kind: type[ChatRequest | CompletionRequest], body: dict[str, Any]) -> ApiError:
    """What a client is told of a request whose form is wrong."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return from_validation(RequestValidationError(errors))


def completion(reader: RequestReader, **given: Any) -> GenerationRequest:
    return reader.completion(CompletionRequest.model_validate({**TEXT, **given}))


def chat(reader: RequestReader, **given: Any) -> GenerationRequest:
    return reader.chat(ChatRequest.model_validate({**CHAT, **given}))


@pytest.mark.parametrize(
    ("kind", "params"), [(ChatRequest, ChatParams), (CompletionRequest, CompletionParams)]
)
def test_every_parameter_of_the_official_client_is_known(
    kind: type[ChatRequest], params: type
) -> None:
    """Catches a parameter of OpenAI's that is called unknown instead of taken or unsupported."""
    assert set(get_type_hints(params)) <= set(kind.model_fields)


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"wholly_different": 1}, "wholly_different", "leave it out"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages", "usage'"),
        ({"lookahead": {"token": 3}}, "lookahead.token", "did you mean 'tokens'"),
        ({"temperatur\ud800": 1}, "temperatur?", "did you mean 'temperature'"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(
    given: dict[str, Any], param: str, said: str
) -> None:
    """Catches options that are silently ignored, at any depth."""
    error = fault(CompletionRequest, {**TEXT, **given})
    assert error.status == 400
    assert said in str(error)
    assert (error.param, error.code) == (param, "unknown_parameter")
    json.dumps(error.reply.model_dump(), ensure_ascii=False).encode()  # it can be sent


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"user": "\ud800"}, "user"),
        ({"logit_bias": {"\ud800": 1}}, "logit_bias.\ufffd\ufffd\ufffd"),
        ({"stream": "yes"}, "stream"),
        ({"lookahead": {"method": "magic"}}, "lookahead.method"),
        ({"lookahead": {"tokens": -1}}, "lookahead.tokens"),
        ({"lookahead": 3}, "lookahead"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(given: dict[str, Any], param: str) -> None:
    """Catches a wrong value that reaches the model, and an error that blames another field."""
    for kind, base in ((CompletionRequest, TEXT), (ChatRequest, CHAT)):
        error = fault(kind, {**base, **given})  # type: ignore[arg-type]
        assert error.status == 400
        assert error.reply.error.param == param, str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a", 1]},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": {"a": 1}},
        {"prompt": None},
        {"prompt": "\udfff"},
        {"logprobs": 6},
        {"logprobs": True},
        {"suffix": "x"},
        {"best_of": 0},
    ],
)
def test_completions_refuse(given: dict[str, Any]) -> None:
    """Catches prompts of forms that nobody defined."""
    assert fault(CompletionRequest, {**TEXT, **given}).status == 400


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported_parameter"),
        ({"functions": []}, "unsupported_parameter"),
        ({"audio": {}}, "unsupported_parameter"),
        ({"prediction": {"type": "content", "content": "x"}}, "unsupported_parameter"),
        ({"web_search_options": {}}, "unsupported_parameter"),
        ({"store": True}, "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "unsupported_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "unsupported_value",
        ),
        ({"modalities": ["audio"]}, "invalid_value"),
        ({"top_logprobs": 21}, "invalid_value"),
        ({"messages": []}, "invalid_value"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "unsupported_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]},
            "unsupported_parameter",
        ),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "unknown_parameter"),
    ],
)
def test_chats_refuse(given: dict[str, Any], code: str) -> None:
    """Catches a chat that is answered as if something it asks for did not matter."""
    error = fault(ChatRequest, {**CHAT, **given})
    assert (error.status, error.code) == (400, code), str(error)
    assert (error.param or "").startswith(next(iter(given)))


def test_a_wrong_part_of_a_message_is_found_where_it_is() -> None:
    """Catches an error that blames the whole message for one of its parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": 3}]
    error = fault(ChatRequest, {**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert error.param == "messages[0].content[1].text"


def test_harmless_parameters_are_taken(reader: RequestReader) -> None:
    """Catches a client that is refused for what it sends by habit."""
    chat(
        reader,
        user="me",
        metadata={"a": "b"},
        store=False,
        n=None,
        stop=None,
        temperature=None,
        modalities=["text"],
        response_format={"type": "text"},
        tool_choice="none",
        parallel_tool_calls=True,
        service_tier="auto",
        prompt_cache_key="x",
        safety_identifier="y",
        tools=None,
    )


def test_a_whole_number_may_be_written_with_a_point(reader: RequestReader) -> None:
    """Catches clients in languages that have one kind of number being refused."""
    assert completion(reader, max_tokens=7.0).sequences[0].options.stopping.max_new_tokens == 7


def test_defaults_are_those_of_openai(reader: RequestReader) -> None:
    """Catches greedy text for clients that said nothing, and other lengths."""
    text, answer = completion(reader).sequences[0].options, chat(reader).sequences[0].options
    assert text.sampling.temperature == answer.sampling.temperature == 1.0
    assert text.stopping.max_new_tokens == 16
    assert answer.stopping.max_new_tokens == LIMITS.max_tokens
    assert text.method == "auto"
    assert text.sampling.seed is None


def test_options_arrive(reader: RequestReader) -> None:
    """Catches an option that is taken and does nothing."""
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
    }
    further = {"stop": ["a", "b"], "logit_bias": {"5": -100}, "max_tokens": 9}
    look_ahead = {"lookahead": {"method": "two-pass", "tokens": 3, "show": True}}
    wanted = completion(reader, **given, **further, **look_ahead)
    options = wanted.sequences[0].options
    assert {name: getattr(options.sampling, name) for name in given} == given
    assert options.sampling.logit_bias == {5: -100}
    assert options.stopping.stop == ("a", "b")
    assert options.stopping.max_new_tokens == 9
    assert (options.method, options.lookahead_tokens) == ("two-pass", 3)
    assert wanted.show


def test_seeds_of_several_texts_go_on(reader: RequestReader) -> None:
    """Catches n texts that are all the same, or whose order depends on the prompts."""
    wanted = completion(reader, prompt=["ab", "c"], n=3, seed=2**64 - 2)
    seeds = [ask.options.sampling.seed for ask in wanted.sequences]
    assert seeds == [2**64 - 2, 2**64 - 1, 0] * 2
    assert [len(ask.prompt) for ask in wanted.sequences] == [2, 2, 2, 1, 1, 1]
    assert wanted.prompt_tokens == 3
    assert completion(reader, seed=-1).sequences[0].options.sampling.seed == 2**64 - 1


def test_a_top_p_of_nothing_keeps_the_likeliest(reader: RequestReader) -> None:
    """Catches OpenAI's lower end being refused further down."""
    assert 0 < completion(reader, top_p=0).sequences[0].options.sampling.top_p < 1e-300


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"max_tokens": 51}, 400, "max_tokens"),
        ({"n": 7}, 400, "n"),
        ({"prompt": ["a"] * 4, "n": 2}, 400, "n"),
        ({"stop": ["a", "b", "c", "d"]}, 400, "stop"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"257": 1}}, 400, "logit_bias"),
        ({"prompt": "x" * 41}, 400, "prompt"),
        ({"prompt": [257], "echo": True}, 400, "prompt"),
        ({"prompt": [[1], [10**30]], "echo": True}, 400, "prompt"),
        ({"best_of": 2}, 400, "best_of"),
        ({"echo": True, "logprobs": 1}, 400, "echo"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ],
)
def test_what_is_beyond_the_server_is_refused(
    reader: RequestReader, given: dict[str, Any], status: int, param: str
) -> None:
    """Catches a limit that is not kept, or cut down silently."""
    with pytest.raises(ApiError) as caught:
        completion(reader, **given)
    assert (caught.value.status, caught.value.param) == (status, param)


@pytest.mark.parametrize(
    "given",
    [
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"max_completion_tokens": 51},
        {"top_logprobs": 2},
        {"logprobs": False, "top_logprobs": 2},
    ],
)
def test_chats_that_contradict_themselves_are_refused(
    reader: RequestReader, given: dict[str, Any]
) -> None:
    """Catches one of two values being taken without a word."""
    with pytest.raises(ApiError):
        chat(reader, **given)


def test_what_the_model_cannot_do_is_told_in_one_line(lm: Generator) -> None:
    """Catches errors of deeper layers that become a 500."""
    plain = RequestReader(Generator(lm.target, lm.tokenizer), LIMITS, 192)
    for given in ({"method": "two-pass"}, {"tokens": 3}, {"method": "ar", "tokens": 1}):
        with pytest.raises(InputError) as caught:
            completion(plain, lookahead=given)
        assert from_input_error(caught.value).status == 400


def test_messages_reach_the_template(reader: RequestReader, lm: Generator) -> None:
    """Catches parts that are lost, and developer messages that a template does not know."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    wanted = chat(
        reader,
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "c", "refusal": None, "annotations": []},
        ],
    )
    assert lm.decode(wanted.sequences[0].prompt) == "<system>d<user>ab<assistant>c<assistant>"


def test_a_status_that_nobody_thought_of_is_an_error_all_the_same() -> None:
    """Catches a refusal of the framework that becomes a fault of ours."""
    error = from_http(HTTPException(416, "no such range"), "/static/app.js")
    assert (error.status, error.reply.error.code) == (416, "invalid_request")


def test_settings_that_make_no_sense_are_refused() -> None:
    """Catches a server that can answer nothing."""
    for given in ({"max_tokens": 0}, {"max_body": -1}, {"max_prompt_tokens": -1}):
        with pytest.raises(SettingsError, match="--max-"):
            ServeSettings(**given)  # type: ignore[arg-type]
    assert "secret" not in repr(ServeSettings(api_keys=("secret",)))


@pytest.mark.parametrize(
    "messages", [[0] * 1000, [{"role": "user", "content": [{"type": "text"}] * 1000}]]
)
def test_one_thing_wrong_is_enough(messages: list[Any]) -> None:
    """Catches a list of nonsense that keeps everybody else waiting while all of it is told."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": NAME, "messages": messages})
    assert caught.value.error_count() <= 2
