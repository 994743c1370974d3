"""The API over a real connection, with a real worker on a tiny model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from byte_model import byte_generator
from prometheus_client.parser import text_string_to_metric_families
from serving import MODEL, SETTINGS, Server, scripted, served, until

from passlm.generate import Generator
from passlm.serve.app import create_app
from passlm.serve.logs import JsonLines
from passlm.serve.protocol import QueueFullError, SequenceOutput
from passlm.serve.settings import ServeSettings, SettingsError

PROMPT = "def f(x):"
METHODS = ("auto", "ar", "two-pass", "one-pass")
CHAT = [{"role": "user", "content": PROMPT}]
KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def lm() -> Generator:
    """To compare with: a model that is served is the worker's alone."""
    return byte_generator()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(byte_generator()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(lm: Generator) -> Iterator[Server]:
    """With keys, and pages of another origin let in."""
    settings = replace(
        SETTINGS,
        api_keys=KEYS,
        cors_origin=("https://page.example",),
        max_body=4096,
        log_prompts=True,
    )
    with scripted(lm, lambda index, ask: [SequenceOutput((), "eos")], settings=settings) as running:
        yield running


@pytest.mark.parametrize("method", METHODS)
def test_a_completion_is_what_the_generator_writes(
    server: Server, lm: Generator, method: str
) -> None:
    """Catches a server that writes another text than the library."""
    [expected] = lm.generate(PROMPT, max_new_tokens=30, method="ar")
    reply = server.complete(PROMPT, max_tokens=30, lookahead={"method": method})
    [choice] = reply["choices"]
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[expected.finish_reason]
    assert reply["usage"]["completion_tokens"] == len(expected.tokens)
    assert reply["usage"]["prompt_tokens"] == len(PROMPT)
    drafting = reply["usage"]["passlm"]
    assert drafting["passes"] + drafting["accepted"] == len(expected.tokens)
    assert sum(drafting["accepted_by_position"]) == drafting["accepted"]


def test_a_chat_is_what_the_generator_answers(server: Server, lm: Generator) -> None:
    """Catches a chat template that is not applied, or applied twice."""
    [expected] = lm.generate([CHAT], max_new_tokens=20)
    asked = {"messages": CHAT, "max_completion_tokens": 20, "temperature": 0}
    reply = server.post("chat/completions", asked).json()
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["object"] == "chat.completion"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_joined_is_the_whole_reply(server: Server, path: str) -> None:
    """Catches a stream and a whole reply that differ, and usage that is missing or doubled."""
    prompt: dict[str, Any] = {"prompt": PROMPT} if path == "completions" else {"messages": CHAT}
    asked = {**prompt, "max_tokens": 20, "seed": 3, "n": 2, "temperature": 0.8}
    whole = server.post(path, asked).json()
    chunks = server.stream(path, {**asked, "stream_options": {"include_usage": True}})
    *parts, last = chunks
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == whole["usage"][name]
    assert all(part["usage"] is None for part in parts)
    for choice in whole["choices"]:
        own = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        texts = [c["text"] if "text" in c else c["delta"].get("content", "") for c in own]
        assert "".join(texts) == choice.get("text", choice.get("message", {}).get("content"))
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert all("usage" not in chunk for chunk in server.stream(path, asked))


def test_texts_of_one_request_are_those_of_several(server: Server) -> None:
    """Catches texts of a list that change with their neighbours, and seeds that do not go on."""
    sampled = {"max_tokens": 12, "temperature": 1.0, "seed": 7}
    reply = server.complete(["ab", PROMPT], n=2, **sampled)
    alone = [
        server.text(prompt, **{**sampled, "seed": seed})
        for prompt in ("ab", PROMPT)
        for seed in (7, 8)
    ]
    assert [choice["text"] for choice in reply["choices"]] == alone
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == 2 + len(PROMPT)


def test_prompts_of_all_forms(server: Server, lm: Generator) -> None:
    """Catches token ids taken for texts, and an echo that is not the prompt."""
    ids = lm.encode(PROMPT)
    expected = server.text(PROMPT)
    assert server.text(ids) == expected
    assert server.text([PROMPT]) == expected
    assert server.text([ids]) == expected
    assert server.text(PROMPT, echo=True) == PROMPT + expected
    assert server.text(ids, echo=True) == PROMPT + expected
    echoed = server.stream("completions", {"prompt": ids, "echo": True, "temperature": 0})
    assert "".join(chunk["choices"][0]["text"] for chunk in echoed) == PROMPT + expected


def test_options_act(server: Server, lm: Generator) -> None:
    """Catches options that are taken and change nothing."""
    text = server.text(PROMPT, max_tokens=30)
    stop = text[5:7]
    stopped = server.complete(PROMPT, max_tokens=30, stop=[stop])["choices"][0]
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"
    first = lm.generate(PROMPT, max_new_tokens=1)[0].tokens[0]
    free, banned = (
        server.complete(PROMPT, logit_bias=bias, logprobs=0)["choices"][0]["logprobs"]["tokens"][0]
        for bias in ({}, {str(first): -100})
    )
    assert free != banned
    assert server.text(PROMPT, frequency_penalty=2, max_tokens=30) != text
    assert server.text(PROMPT, repetition_penalty=1.5, max_tokens=30) != text
    assert server.text(PROMPT, temperature=1, top_k=1, max_tokens=30) == text
    assert server.text(PROMPT, temperature=1, top_p=0, max_tokens=30) == text


def test_logprobs_are_the_models_own(server: Server, lm: Generator) -> None:
    """Catches log-probabilities of another place or after the temperature."""
    reply = server.complete(PROMPT, max_tokens=6, logprobs=3)["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        reply["tokens"], reply["token_logprobs"], reply["top_logprobs"], strict=True
    ):
        assert top[token] == pytest.approx(logprob)
        assert max(top.values()) == pytest.approx(logprob)  # greedy
        assert len(top) == 3
    asked = {"messages": CHAT, "max_tokens": 6, "temperature": 0, "logprobs": True}
    cold = server.post("chat/completions", {**asked, "top_logprobs": 2}).json()
    entries = cold["choices"][0]["logprobs"]["content"]
    assert len(entries) == 6
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in entries)


def test_shown_tokens_make_up_the_text(server: Server) -> None:
    """Catches a page whose coloured tokens differ from the text."""
    look_ahead = {"method": "one-pass", "show": True}
    asked = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "lookahead": look_ahead}
    usage = {"stream_options": {"include_usage": True}}
    *chunks, last = server.stream("completions", {**asked, **usage})
    shown = [c["passlm"] for chunk in chunks for c in chunk["choices"] if "passlm" in c]
    assert "".join("".join(s["texts"]) for s in shown) == server.text(PROMPT, max_tokens=30)
    accepted = sum(position > 0 for s in shown for position in s["positions"])
    assert accepted == last["usage"]["passlm"]["accepted"]
    assert len(shown) == last["usage"]["passlm"]["passes"]


def test_a_chat_that_goes_on_finds_its_prompt_at_hand(server: Server) -> None:
    """Catches a count of cached tokens that is always 0."""
    first = server.complete("a chat that goes on and on and on", max_tokens=8)
    again = server.complete("a chat that goes on and on and on", max_tokens=8)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


# The official client


def test_the_official_client_streams_and_parses(client: openai.OpenAI) -> None:
    """Catches replies whose fields the official client does not find."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    whole = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,  # type: ignore[arg-type]
    )
    parts = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_tokens=12,
        temperature=0,
        stream=True,  # type: ignore[arg-type]
    )
    joined = "".join(part.choices[0].delta.content or "" for part in parts)
    assert joined == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].logprobs is not None
    text = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=5, extra_body={"lookahead": {"method": "ar"}}
    )
    assert text.choices[0].finish_reason == "length"


def test_errors_are_those_of_the_official_client(
    client: openai.OpenAI, guarded: Server, lm: Generator
) -> None:
    """Catches a status that the client takes for another kind of error."""
    with pytest.raises(openai.NotFoundError, match="no model 'other'") as missing:
        client.completions.create(model="other", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/name")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=3)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError, match="at most 191 are allowed"):
        client.completions.create(model=MODEL, prompt="x" * 500)
    stranger = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    friend = stranger.with_options(api_key=KEYS[1])
    assert friend.completions.create(model=MODEL, prompt=PROMPT).choices[0].text == ""
    with scripted(lm, lambda index, ask: [], QueueFullError(7)) as full:
        busy = openai.OpenAI(base_url=f"{full.url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.RateLimitError) as refused:
            busy.completions.create(model=MODEL, prompt=PROMPT)
        assert refused.value.response.headers["retry-after"] == "7"


# Keys, limits, headers


def test_keys_protect_the_api_and_the_metrics(guarded: Server) -> None:
    """Catches a path that answers without a key, and a probe that needs one."""
    client = guarded.client()
    for path in ("/v1/models", "/v1/nothing", "/metrics", "/v1/models/x"):
        refused = client.get(path)
        assert refused.status_code == 401, path
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/ready", "/", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    assert client.get("/metrics%0A").status_code == 404  # a route's end matches before a line break
    for given in ("Bearer first-key", "bearer second-key", "Bearer  first-key"):
        assert client.get("/metrics", headers={"authorization": given}).status_code == 200
    for given in ("Bearer first-ke", "Basic first-key", "first-key", "Bearer", "", "Bearer \xff"):
        headers = {"authorization": given.encode("latin-1")}
        assert client.get("/v1/models", headers=headers).status_code == 401, given
    schema = client.get("/openapi.json").json()
    assert schema["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in schema["paths"]["/health"]["get"]


def test_other_origins_are_let_in_only_where_told(server: Server, guarded: Server) -> None:
    """Catches a server that pages of other sites can use."""
    origin = {"origin": "https://page.example"}
    preflight = {**origin, "access-control-request-method": "POST"}
    assert (
        "access-control-allow-origin" not in server.client().get("/health", headers=origin).headers
    )
    client = guarded.client()
    asked = client.options("/v1/completions", headers=preflight)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (
        200,
        "https://page.example",
    )
    other = client.get("/health", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_every_response_has_its_headers(server: Server) -> None:
    """Catches an error page without them, and ids that are taken from anybody."""
    client = server.client()
    for path in ("/", "/docs", "/nothing", "/v1/models", "/static/style.css"):
        headers = client.get(path, headers={"x-request-id": "mine-1"}).headers
        assert headers["x-request-id"] == "mine-1"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers
    made_up = client.get("/health", headers={"x-request-id": 'a" b'}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made_up)
    assert client.get("/v1/models").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/static/../app.py", 404, "not_found"),
        ("GET", "/static/%2e%2e/app.py", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/", 405, "method_not_allowed"),
    ],
)
def test_paths_and_methods_that_are_not_there(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    """Catches errors in another form than the API's."""
    response = server.client().request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"null", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"model": NaN}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"model": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b'{"\\ud800": 1}', "application/json", 400),
        (b'{"model": "bytes", "prompt": "\\ud800"}', "application/json", 400),
        (b'{"model": "\\ud800", "prompt": "a"}', "application/json", 400),
        (b'{"model": "bytes"}', "text/plain", 415),
        (b'{"model": "bytes"}', None, 415),
        (b"model=bytes", "application/x-www-form-urlencoded", 415),
        (
            b'{"model": "bytes", "prompt": "a", "max_tokens": 1}',
            "application/json; charset=utf-8",
            200,
        ),
    ],
)
def test_bodies_that_are_no_requests(
    server: Server, content: bytes, kind: str | None, status: int
) -> None:
    """Catches a body that ends in a 500."""
    headers = {} if kind is None else {"content-type": kind}
    client = server.client()
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert client.get("/health").status_code == 200
    if status != 200:
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_compressed_bodies_are_refused(server: Server) -> None:
    """Catches compressed bytes that are read as JSON."""
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = server.client().post("/v1/completions", content=b"x", headers=headers)
    assert response.status_code == 415


def test_a_model_without_a_name_is_refused(lm: Generator) -> None:
    """Catches a server that nobody can ask for its model."""
    with scripted(lm, lambda index, ask: []) as running, pytest.raises(SettingsError):
        create_app(lm, running.worker, ServeSettings())


# Pages, metrics, logs


def test_pages_need_nothing_from_other_hosts(server: Server) -> None:
    """Catches a page that stays blank behind a firewall, and one without what it names."""
    client = server.client()
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert client.head(path).status_code == 200
        assert "<script>" not in page.text
        assert " style=" not in page.text
        for link in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
            assert "//" not in link, link
            assert client.get("/" + link.removeprefix("./")).status_code == 200, link
    docs = client.get("/docs").text
    for name in ("/v1/chat/completions", "lookahead", "max_completion_tokens", "ErrorReply"):
        assert name in docs


def test_metrics_count_what_was_done() -> None:
    """Catches figures that stay 0, and paths that anybody can add to."""
    with served(byte_generator()) as server:
        reply = server.complete(PROMPT, max_tokens=20, lookahead={"method": "one-pass"})
        server.stream("completions", {"prompt": PROMPT, "max_tokens": 5})
        client = server.client()
        for path in ("/nothing", "/else", "/v1/models/a", "/v1/models/b"):
            client.get(path)
        found = figures(client.get("/metrics"))
    usage = reply["usage"]
    texts = found["passlm_tokens_total", ()]
    assert texts == usage["completion_tokens"] + 5
    assert found["passlm_prompt_tokens_total", ()] == 2 * len(PROMPT)
    assert found["passlm_requests_total", ("other", "404")] == 2
    assert found["passlm_requests_total", ("/v1/models/*", "404")] == 2
    assert found["passlm_requests_total", ("/v1/completions", "200")] == 2
    assert found["passlm_time_to_first_token_seconds_count", ()] == 2
    accepted = sum(v for (name, _), v in found.items() if name == "passlm_accepted_total")
    judged = sum(v for (name, _), v in found.items() if name == "passlm_judged_total")
    assert judged >= accepted >= usage["passlm"]["accepted"]
    assert judged > 0
    assert found["passlm_tokens_per_pass_sum", ()] == texts
    assert found["passlm_time_between_tokens_seconds_count", ()] > 0
    assert found["passlm_ready", ()] == 1
    assert found["passlm_passes_total", ()] >= usage["passlm"]["passes"]
    assert found["passlm_texts_total", ("length",)] == 2
    assert found["passlm_running_texts", ()] == 0


def figures(response: httpx.Response) -> dict[tuple[str, tuple[str, ...]], float]:
    """Metrics by name and labels, those of buckets left out."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_readiness_follows_the_worker(lm: Generator) -> None:
    """Catches traffic sent to a server that is warming up or going down."""
    with scripted(lm, lambda index, ask: []) as server:
        client = server.client()
        assert client.get("/ready").json() == {"status": "ready"}
        server.worker.ready = False
        asked = server.post("completions", {"prompt": "x"})
        for refused in (client.get("/ready"), asked):
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
        assert not server.worker.asked
        assert client.get("/health").json() == {"status": "ok"}


def test_the_log_is_json_and_holds_no_prompts(
    server: Server, guarded: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches what people wrote in a log that nobody told to keep it."""
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("completions", {"prompt": "a secret prompt", "max_tokens": 2}),
        ("completions", {"prompt": "a secret prompt", "a secret name": 1}),
        ("chat/completions", {"messages": [{"role": "x", "content": "a secret"}]}),
    ]

    def told() -> dict[str, dict[str, Any]]:
        """Lines of these requests, by their ids."""
        lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
        return {line["id"]: line for line in lines if "log-" in line.get("id", "")}

    with caplog.at_level(logging.DEBUG, logger="passlm"):
        for number, (path, body) in enumerate(bodies):
            server.post(path, body, headers={"x-request-id": f"log-{number}"})
        server.client().get("/health", headers={"x-request-id": "log-3"})
        until(lambda: len(told()) == 4)
    assert not any("secret" in JsonLines().format(record) for record in caplog.records)
    lines = [told()[f"log-{number}"] for number in range(4)]
    assert [line["status"] for line in lines] == [200, 400, 400, 200]
    assert [line["level"] for line in lines] == ["info", "info", "info", "debug"]
    assert lines[0]["tokens"] == 2
    assert {"time", "level", "id", "path", "method", "seconds"} <= set(lines[0])
    caplog.clear()
    with caplog.at_level(logging.INFO):
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        guarded.post("completions", {"prompt": "kept on purpose"}, headers=headers)
        until(lambda: any("kept on purpose" in JsonLines().format(r) for r in caplog.records))


def test_faults_are_logged_with_where_they_came_from() -> None:
    """Catches a traceback that spans lines, and one that is lost."""
    record = logging.LogRecord("a", logging.ERROR, "f", 1, "it %s", ("broke",), None)
    try:
        raise ValueError("of this")
    except ValueError:
        import sys

        record.exc_info = sys.exc_info()
    text = JsonLines().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["event"] == "it broke"
    assert "ValueError: of this" in line["exception"]
