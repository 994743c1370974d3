"""HTML documentation of the API, made from its schema; loads nothing from other hosts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Schema = Mapping[str, Any]


def docs_page(schema: Schema) -> str:
    """Return the documentation page.

    Args:
        schema: the OpenAPI schema.
    """
    info, schemas = schema["info"], schema["components"]["schemas"]
    operations = [
        _operation(method, path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    sections = [_schema_section(name, part) for name, part in schemas.items()]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(info['title'])}: API reference</title>",
            '<link rel="icon" href="static/icon.svg" type="image/svg+xml">',
            '<link rel="stylesheet" href="docs.css">',
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
            f"<p>{_text(info['description'])}</p>",
            '<p>Machine-readable schema: <a href="openapi.json">openapi.json</a>. '
            '<a href="./">Try it in the playground.</a></p>',
            "<h2>Paths</h2>",
            *operations,
            "<h2>Requests and responses</h2>",
            *sections,
            "</html>",
        ]
    )


def _operation(method: str, path: str, operation: Schema) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    takes = "".join(
        f"<p>Request body: {_kind(content['schema'])} as {escape(media)}.</p>"
        for media, content in body.items()
    )
    rows = "".join(
        f"<tr><th>{escape(status)}</th><td>{_answer(answer)}</td></tr>"
        for status, answer in sorted(operation["responses"].items())
    )
    return (
        f"<section><h3><code>{escape(method.upper())} {escape(path)}</code></h3>"
        f"<p>{_text(operation.get('description', ''))}</p>{takes}"
        f"<table><tbody>{rows}</tbody></table></section>"
    )


def _answer(answer: Schema) -> str:
    contents = answer.get("content", {})
    kinds = (f"{_content(content)} as {escape(media)}" for media, content in contents.items())
    return ", or ".join(kinds) or escape(answer.get("description", ""))


def _content(content: Schema) -> str:
    """Return the type of a response body; for a stream, the type of its events."""
    if "itemSchema" not in content:
        return _kind(content.get("schema", {}))
    [_, chunk] = content["itemSchema"]["properties"]["data"]["anyOf"]
    return f"with <code>stream</code> events of {_kind(chunk['contentSchema'])}"


def _schema_section(name: str, part: Schema) -> str:
    rows = "".join(_field(field, of, part) for field, of in part.get("properties", {}).items())
    return (
        f'<section id="{escape(name)}"><h3>{escape(name)}</h3>'
        f"<p>{_text(part.get('description', ''))}</p>"
        f"<table><tbody>{rows}</tbody></table></section>"
    )


def _field(name: str, field: Schema, part: Schema) -> str:
    required = " (required)" if name in part.get("required", ()) else ""
    limits = ", ".join(_limits(field))
    return (
        f"<tr><th><code>{escape(name)}</code>{required}</th><td>{_kind(field)}"
        f"{f', {escape(limits)}' if limits else ''}</td>"
        f"<td>{_text(field.get('description', ''))}</td></tr>"
    )


def _limits(field: Schema) -> Iterator[str]:
    """Yield the limits of a value, also where null is allowed as well."""
    words = {"minimum": "at least", "maximum": "at most", "exclusiveMaximum": "below"}
    for arm in field.get("anyOf", [field]):
        for key, word in words.items():
            if key in arm:
                yield f"{word} {arm[key]}"


def _kind(field: Schema) -> str:
    """Return the type of a value, with a link if it is described on the page."""
    if "$ref" in field:
        name = escape(field["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in field:
        return " or ".join(_kind(arm) for arm in field["anyOf"])
    if "const" in field or "enum" in field:
        values = field.get("enum", [field.get("const")])
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return escape(str(field.get("type", "anything")))


def _text(text: str) -> str:
    """Escape a text, with `code` in backticks marked as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if n % 2 else part for n, part in enumerate(parts))
