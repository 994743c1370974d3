"""The server as people run it: a process, the real model, and the clients that people use."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import until

import passlm

pytestmark = pytest.mark.model

MODEL = "smollm2-135m"
KEY = "key-of-the-test"
CODE = "def fibonacci(n):\n"
CHAT: list[Any] = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """`passlm serve` in float32, where texts do not depend on their neighbours to the last bit."""
    source = str(Path(__file__).parents[1] / "src")
    few = ["--max-batch", "4", "--max-context", "512", "--threads", "1"]
    flags = ["--port", "0", "--dtype", "float32", "--no-compile", *few]
    process = subprocess.Popen(
        [sys.executable, "-m", "passlm.cli", "serve", *flags],
        env={**os.environ, "PYTHONPATH": source, "PASSLM_API_KEY": KEY},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None, "the server did not start"
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300) as made:
        yield made


@pytest.fixture(scope="module")
def alone() -> str:
    """What the library writes without a server."""
    lm = passlm.load(MODEL, dtype="float32")
    return lm.generate(CODE, max_new_tokens=40, method="ar")[0].text


def test_the_official_client_gets_the_librarys_text(client: openai.OpenAI, alone: str) -> None:
    """Catches a server whose text is not the model's, under any method."""
    for method in ("auto", "ar", "two-pass", "one-pass"):
        reply = client.completions.create(
            model=MODEL,
            prompt=CODE,
            max_tokens=40,
            temperature=0,
            extra_body={"lookahead": {"method": method}},
        )
        assert reply.choices[0].text == alone, method
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 40
        drafting = (reply.usage.model_extra or {})["passlm"]
        assert (drafting["accepted"] > 0) == (method != "ar")


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    """Catches a stream that the client does not parse, or that is another text."""
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 24, "seed": 5}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    joined = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert joined == whole.choices[0].message.content
    assert joined
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_of_the_real_vocabulary(client: openai.OpenAI) -> None:
    """Catches tokens whose bytes are not those of the text."""
    reply = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=16, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = reply.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    spelt = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert spelt.decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0


def test_errors_come_as_the_clients_exceptions(client: openai.OpenAI) -> None:
    """Catches a status that means something else to the client."""
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt=CODE)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="word " * 600)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model=MODEL,
            messages=CHAT,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()


def test_texts_are_the_same_beside_others(client: openai.OpenAI, alone: str) -> None:
    """Catches neighbours in a batch that change a text, greedy or seeded."""

    def asked(number: int) -> str:
        given: dict[str, Any] = {"prompt": CODE, "temperature": 0, "max_tokens": 40}
        if number % 2:
            given = {"prompt": f"Item {number}:", "seed": number, "max_tokens": 20 + number}
        return client.completions.create(model=MODEL, **given).choices[0].text

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(asked, range(6)))
    assert together[::2] == [alone] * 3
    assert together[1::2] == [asked(number) for number in (1, 3, 5)]


def test_langchain_talks_to_it(url: str) -> None:
    """Catches a parameter that LangChain sends by habit and the server refuses."""
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI
    from pydantic import SecretStr

    shared: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": SecretStr(KEY), "model": MODEL}
    chat = ChatOpenAI(**shared, temperature=0, max_tokens=16, max_retries=0)  # type: ignore[call-arg]
    messages = [SystemMessage("You are brief."), HumanMessage("Name the capital of France.")]
    answer = chat.invoke(messages)
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 16
    assert "".join(str(part.content) for part in chat.stream(messages)) == answer.content
    again = chat.invoke([*messages, answer, HumanMessage("And of Italy?")])
    assert again.content
    text = OpenAI(**shared, temperature=0, max_tokens=8, max_retries=0)
    assert text.invoke(CODE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_talks_to_it(url: str, alone: str) -> None:
    """Catches a server that works with one library's habits alone."""

    def curl(*arguments: str, key: str = KEY) -> str:
        given = ["-sS", "-m", "120", "-H", f"Authorization: Bearer {key}", *arguments]
        return subprocess.run(["curl", *given], capture_output=True, text=True, check=True).stdout

    body = json.dumps({"model": MODEL, "prompt": CODE, "max_tokens": 40, "temperature": 0})
    sent = ["-H", "Content-Type: application/json", "-d"]
    reply = json.loads(curl(f"{url}/v1/completions", *sent, body))
    assert reply["choices"][0]["text"] == alone
    streamed = json.dumps({**json.loads(body), "stream": True})
    lines = curl("-N", f"{url}/v1/completions", *sent, streamed).splitlines()
    assert lines[-2] == "data: [DONE]"
    assert curl("-o", os.devnull, "-w", "%{http_code}", f"{url}/v1/models", key="no") == "401"
    huge = curl("-w", "%{http_code}", f"{url}/v1/completions", *sent, "@-", "-o", os.devnull)
    assert huge == "400"  # nothing on standard input


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_killed_client_leaves_nothing_behind(url: str, alone: str) -> None:
    """Catches texts that are written for clients that were killed amid their streams."""
    key = {"Authorization": f"Bearer {KEY}"}
    body = {"model": MODEL, "prompt": CODE, "max_tokens": 400, "temperature": 1, "stream": True}
    given = [part for name, value in key.items() for part in ("-H", f"{name}: {value}")]
    asked = ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    for _ in range(3):
        with subprocess.Popen(
            ["curl", "-sS", "-N", *given, *asked, f"{url}/v1/completions"], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()
    reply = httpx.post(
        f"{url}/v1/completions",
        headers=key,
        json={"model": MODEL, "prompt": CODE, "max_tokens": 40, "temperature": 0},
        timeout=120,
    )
    assert reply.json()["choices"][0]["text"] == alone

    def nothing_is_left() -> bool:
        lines = httpx.get(f"{url}/metrics", headers=key).text.splitlines()
        return {"passlm_running_texts 0.0", "passlm_waiting_texts 0.0"} <= set(lines)

    until(nothing_is_left)
