"""Complete FastAPI's OpenAPI schema with streams, limits, examples and API keys."""

from __future__ import annotations

from typing import Any

from passlm.serve.response_schema import ChatChunk, CompletionChunk, ErrorReply, Reply
from passlm.serve.settings import ServeSettings

REFERENCE = "#/components/schemas/{model}"
REQUESTS = {
    "CompletionRequest": "/v1/completions",
    "ChatRequest": "/v1/chat/completions",
}
MODEL_PATH = "/v1/models/"
_PROMPT = {"prompt": "def fibonacci(n):"}
_CHAT = {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
_WHOLE = {"max_tokens": 8, "temperature": 0, "stop": ["\n\n"]}
_STREAM = {
    "max_tokens": 8,
    "n": 2,
    "seed": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
    "lookahead": {"method": "auto", "show": True},
}
_EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "CompletionRequest": {
        "whole": {**_PROMPT, **_WHOLE, "logprobs": 2},
        "stream": {**_PROMPT, **_STREAM, "logprobs": 1},
        "several prompts": {"prompt": ["one", "two"], "max_tokens": 4, "echo": True},
    },
    "ChatRequest": {
        "whole": {**_CHAT, **_WHOLE, "logprobs": True, "top_logprobs": 2},
        "stream": {**_CHAT, **_STREAM, "logprobs": True},
    },
}


def needs_key(path: str) -> bool:
    """Return whether a path requires an API key if the server has any."""
    return path.startswith("/v1/") or path == "/metrics"


def event(chunk: type[Reply]) -> dict[str, Any]:
    """Return the schema of one event of a stream: a chunk, an error, or the final `[DONE]`."""
    contents = [{"$ref": REFERENCE.format(model=kind.__name__)} for kind in (chunk, ErrorReply)]
    json = {"contentMediaType": "application/json", "contentSchema": {"anyOf": contents}}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, json]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def complete(schema: dict[str, Any], settings: ServeSettings) -> dict[str, Any]:
    """Add the parts that FastAPI cannot derive: stream events, model name, limits, examples, keys.

    Args:
        schema: the schema of FastAPI; modified in place.
        settings: model name, limits and keys of the server.

    Returns:
        The same schema.
    """
    parts = schema["components"]["schemas"]
    for chunk in (CompletionChunk, ChatChunk):
        described = chunk.model_json_schema(ref_template=REFERENCE)
        parts |= described.pop("$defs") | {chunk.__name__: described} | parts
    name = {"type": "string", "enum": [settings.model_name], "title": "Model"}
    schema["paths"][MODEL_PATH + "{model}"]["get"]["parameters"][0]["schema"] = name
    for request, path in REQUESTS.items():
        parts[request]["properties"]["model"] = name
        _add_limits(parts[request]["properties"], settings)
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        body["examples"] = {
            title: {"value": {"model": settings.model_name, **example}}
            for title, example in _EXAMPLES[request].items()
        }
    if settings.api_keys:
        _add_security(schema)
    return schema


def _add_limits(properties: dict[str, Any], settings: ServeSettings) -> None:
    limits = (
        ("n", "integer", "maximum", settings.max_texts),
        ("max_tokens", "integer", "maximum", settings.max_tokens),
        ("max_completion_tokens", "integer", "maximum", settings.max_tokens),
        ("stop", "array", "maxItems", settings.max_stops),
        ("logit_bias", "object", "maxProperties", settings.max_logit_bias),
    )
    for name, kind, limit, value in limits:
        for arm in properties.get(name, {}).get("anyOf", ()):
            if arm.get("type") == kind:
                arm[limit] = value


def _add_security(schema: dict[str, Any]) -> None:
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path in filter(needs_key, schema["paths"]):
        for operation in schema["paths"][path].values():
            operation["security"] = [{"key": []}]
            operation["responses"]["401"] = operation["responses"]["default"]
