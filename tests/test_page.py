"""The server's page, driven in headless Chromium against a real server with a tiny model.

The model counts through sixteen characters that a page must not take for markup, so that its text
is drafted well and shows what is escaped.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from small_llama import counting_llama, counting_look_ahead
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from passlm.decoding.decoder import Decoder
from passlm.generate import Generator
from passlm.serve.protocol import WorkerSettings

uvicorn = pytest.importorskip("uvicorn", reason="the page needs the server: the extra 'serve'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive the page")

from passlm.serve.app import create_app  # noqa: E402
from passlm.serve.settings import ServeSettings  # noqa: E402
from passlm.serve.worker import Worker  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to drive the page with")

NUMBERS = "<b>&\n\té→\"'/={}x…"  # of the model's ids
BLANKS = "wvuz"
PROMPT = "<b>&\n\té→"
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
KEY = "a key"
MOST_TOKENS = 64
VERDICT = ".verdict:not([hidden])"
DONE = 20_000  # milliseconds, on a busy machine


def characters() -> PreTrainedTokenizerFast:
    """One character a token; unknown ones are read as the first."""
    vocabulary = {character: number for number, character in enumerate(NUMBERS + BLANKS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=NUMBERS[0]))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = CHAT
    return tokenizer


@contextmanager
def served(lm: Generator, **settings: Any) -> Iterator[tuple[str, Worker]]:
    """A server on a port of its own; gives its address and its worker."""
    worker = Worker(lm, WorkerSettings(max_batch=2, max_context=128))
    chosen = ServeSettings(model_name="counting", max_tokens=MOST_TOKENS, **settings)
    app = create_app(lm, worker, chosen)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    worker.start()
    thread.start()
    try:
        wait_until(lambda: server.started and worker.state().ready)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", worker
    finally:
        server.should_exit = True
        thread.join()
        worker.stop(grace=0)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def lm() -> Generator:
    return Generator(counting_llama(), characters(), counting_look_ahead())


@pytest.fixture(scope="module")
def server(lm: Generator) -> Iterator[tuple[str, Worker]]:
    with served(lm) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """A page and what it did.

    Attributes:
        errors: of the console, violations of the content security policy included; a test that
            expects some clears them.
        requests: sent, in order.
    """

    page: Any
    base: str
    worker: Worker
    errors: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.set_default_timeout(DONE)
        self.page.goto(self.base)
        self.page.locator("#model", has_text="counting").wait_for()

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def ask(self, text: str, keys: str = "Control+Enter", tokens: int = 40) -> None:
        """Type and run."""
        self.page.fill("[name=max_tokens]", str(tokens))
        self.page.fill("#input", text)
        self.page.locator("#input").press(keys)

    def done(self) -> None:
        """Wait for the end of what runs."""
        self.page.locator("#stop[aria-disabled=true]").wait_for()

    def texts(self) -> list[str]:
        """What the model wrote, pane by pane."""
        panes = self.page.locator(".panes .pane").all()
        return ["".join(pane.locator(".text .token").all_text_contents()) for pane in panes]

    def figure(self, name: str) -> str:
        """One of the first pane's figures."""
        return str(self.page.locator(f".pane [data-figure={name}]").first.inner_text())

    def bodies(self) -> list[dict[str, Any]]:
        """What was asked for so far."""
        return [json.loads(r.post_data) for r in self.requests if r.method == "POST"]


@pytest.fixture
def visit(browser: Any, server: tuple[str, Worker]) -> Iterator[Visit]:
    """A visit that must end without an error and without a request to another host."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    visitor = Visit(context.new_page(), *server)
    yield visitor
    context.close()
    assert visitor.errors == []
    hosts = {urlsplit(request.url).netloc for request in visitor.requests}
    assert hosts == {urlsplit(visitor.base).netloc}


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take long enough to do something meanwhile."""
    step = Decoder.step

    def slow(self: Decoder) -> Any:
        time.sleep(0.1)
        return step(self)

    monkeypatch.setattr(Decoder, "step", slow)


def test_a_prompt_streams_token_by_token(visit: Visit) -> None:
    """Catches text that is lost, doubled or read as markup, and wrong marks and figures."""
    visit.ask(PROMPT)
    visit.done()
    (body,) = visit.bodies()
    alone = httpx.post(
        f"{visit.base}/v1/completions",
        json={k: v for k, v in body.items() if k not in ("stream", "stream_options")},
    ).json()
    assert visit.texts() == [alone["choices"][0]["text"]]
    assert "<b>" in visit.texts()[0]
    assert visit.page.locator(".text b").count() == 0
    counted = alone["usage"]["passlm"]
    assert visit.figure("tokens") == "40"
    assert visit.figure("perPass") == f"{40 / counted['passes']:.2f}"
    assert visit.figure("share") == f"{int(100 * counted['accepted'] / 40 + 0.5)} %"
    assert float(visit.figure("rate")) > 0
    marked = visit.page.locator('.text .token:not([data-position="0"])').count()
    assert marked == counted["accepted"] > 5
    assert f"40 tokens in {counted['passes']} passes" in visit.page.inner_text(".ending")


def test_marks_do_without_colour(visit: Visit) -> None:
    """Catches a position that is told by colour alone."""
    marks = visit.page.eval_on_selector_all(
        ".legend .token",
        "all => all.map(e => getComputedStyle(e)).map(s => "
        "[s.textDecorationLine, s.textDecorationStyle, s.textDecorationThickness].join())",
    )
    assert len(set(marks)) == len(marks) == 6


def test_the_text_comes_while_it_is_written_and_stops(visit: Visit, slowly: None) -> None:
    """Catches a page that waits for the whole, and a Stop that leaves the server at work."""
    visit.ask(PROMPT, tokens=MOST_TOKENS)
    visit.page.locator(".text .token").nth(3).wait_for()
    assert visit.page.get_attribute(".text", "aria-busy") == "true"
    assert visit.worker.state().running == 1
    visit.page.keyboard.press("Escape")
    visit.done()
    came = visit.page.locator(".text .token").count()
    assert came < MOST_TOKENS
    assert visit.page.inner_text(".ending") == f"Stopped after {came} tokens."
    assert visit.figure("tokens") == str(came)
    wait_until(lambda: visit.worker.state().running == 0)


def test_compares_one_after_the_other(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches runs beside each other, another seed for the second one, and a wrong verdict."""
    submit, busy = visit.worker.submit, []

    def noted(*given: Any) -> Any:
        busy.append(visit.worker.state().running)
        return submit(*given)

    monkeypatch.setattr(visit.worker, "submit", noted)
    visit.page.fill("[name=temperature]", "0.8")
    visit.ask(PROMPT, keys="Control+Shift+Enter")
    visit.page.locator(VERDICT).wait_for()
    first, second = visit.bodies()
    assert (first.pop("lookahead"), second.pop("lookahead")) == (
        {"method": "auto", "show": True},
        {"method": "ar", "show": True},
    )
    assert first == second
    assert busy == [0, 0]
    one, other = visit.texts()
    assert one == other
    verdict = visit.page.inner_text(VERDICT)
    assert re.search(r"auto is \d+\.\d\d times as fast", verdict)
    assert verdict.endswith("The texts are identical.")


def test_marks_where_texts_part(visit: Visit) -> None:
    """Catches a comparison that calls different texts equal."""

    def another(route: Any) -> None:
        body = json.loads(route.request.post_data)
        if body["lookahead"]["method"] == "ar":
            body["prompt"] = PROMPT[::-1]
        route.continue_(post_data=json.dumps(body))

    visit.page.route("**/v1/completions", another)
    visit.ask(PROMPT, keys="Control+Shift+Enter")
    visit.page.locator(VERDICT).wait_for()
    one, other = visit.texts()
    same = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert f"differ after {same} characters" in visit.page.inner_text(VERDICT)
    assert visit.page.locator(".parts").all_text_contents() == [one[same], other[same]]


def test_a_chat_goes_on(visit: Visit) -> None:
    """Catches an answer that is missing from the next request, and a chat that cannot be left."""
    visit.page.check("[value=chat]")
    visit.ask("<b", tokens=5)
    visit.done()
    (answer,) = visit.texts()
    assert visit.page.input_value("#input") == ""
    visit.ask("&\n", tokens=5)
    visit.done()
    assert visit.bodies()[-1]["messages"] == [
        {"role": "user", "content": "<b"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "&\n"},
    ]
    assert visit.page.locator(".turns li").count() == 3
    visit.page.click("#new-chat")
    assert visit.page.locator(".turns li, .pane").count() == 0
    assert visit.page.is_visible("#intro")


def test_a_refusal_is_told_in_place(visit: Visit) -> None:
    """Catches a silent failure, and a message that has to be written again."""
    visit.page.check("[value=chat]")
    visit.ask("b>", tokens=MOST_TOKENS + 1)
    visit.page.locator("#problem", has_text=f"at most {MOST_TOKENS} are allowed").wait_for()
    assert visit.page.input_value("#input") == "b>"
    assert visit.page.locator(".turns li, .pane").count() == 0
    assert [error for error in visit.errors if "400" not in error] == []
    visit.errors.clear()
    visit.ask("b>", tokens=5)
    visit.done()
    assert visit.page.is_hidden("#problem")
    assert len(visit.texts()[0]) == 5


def test_an_answer_that_breaks_off_is_kept_and_said(visit: Visit) -> None:
    """Catches half an answer that is shown as a whole one."""
    piece = {"index": 0, "text": "b>", "finish_reason": None}
    piece["passlm"] = {"texts": ["b", ">"], "positions": [1, 0]}
    half = f"data: {json.dumps({'choices': [piece]})}\n\n"
    visit.page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=half, content_type="text/event-stream"),
    )
    visit.ask(PROMPT)
    problem = visit.page.locator(
        "#problem", has_text="The connection was lost during the response."
    )
    problem.wait_for()
    assert visit.texts() == ["b>"]
    visit.done()


def test_a_server_that_goes_away_is_said_and_found_again(visit: Visit) -> None:
    """Catches a page that has to be loaded again once the server is back."""
    visit.page.route("**/*", lambda route: route.abort())
    visit.ask(PROMPT)
    visit.page.locator("#problem", has_text="The server does not answer.").wait_for()
    assert visit.page.inner_text("#model") == "not answering"
    visit.page.unroute("**/*")
    visit.page.locator("#model", has_text="counting").wait_for()
    assert visit.page.is_hidden("#problem")
    assert [error for error in visit.errors if "ERR_FAILED" not in error] == []
    visit.errors.clear()
    visit.ask(PROMPT)
    visit.done()
    assert len(visit.texts()[0]) == 40


def test_asks_for_the_key(browser: Any, lm: Generator) -> None:
    """Catches a key in an address, and a page that cannot be used with one."""
    with served(lm, api_keys=(KEY,)) as (base, _):
        page = browser.new_page()
        sent: list[Any] = []
        page.on("request", lambda request: sent.append(request))
        page.goto(base)
        page.locator("#problem", has_text="API key").wait_for()
        page.fill("#key", "another one")
        page.keyboard.press("Enter")
        page.locator("#problem", has_text="is not valid").wait_for()
        page.fill("#key", "a\u200bkey")  # what no header can carry, as from a web page
        page.keyboard.press("Enter")
        page.locator("#problem", has_text="letters, digits and punctuation").wait_for()
        page.fill("#key", f" {KEY} ")
        page.keyboard.press("Enter")
        page.locator("#model", has_text="counting").wait_for()
        page.reload()
        page.locator("#model", has_text="counting").wait_for()
        page.fill("[name=max_tokens]", "5")
        page.fill("#input", PROMPT)
        page.click("#run")
        page.locator(".ending", has_text="tokens in").wait_for()
        assert page.is_hidden("#key-form")
        assert not any("key" in urlsplit(request.url).query for request in sent)
        assert sent[-1].headers["authorization"] == f"Bearer {KEY}"
        page.close()


def test_works_by_keyboard_alone(visit: Visit) -> None:
    """Catches a control that cannot be reached, an order that jumps, a focus that is not seen."""
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the prompt"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.insert_text(PROMPT)
    met = []
    for _ in range(8):
        page.keyboard.press("Tab")
        met.append(page.evaluate("document.activeElement.name || document.activeElement.id"))
        width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert width == "3px", met[-1]
        if met[-1] == "max_tokens":
            page.keyboard.insert_text("40")  # in place of what is there
    settings = ["method", "tokens", "temperature", "max_tokens", "seed"]
    assert met == [*settings, "run", "compare", "stop"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    visit.done()
    assert page.evaluate("document.activeElement.id") == "run"
    page.focus(".text")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    last = page.locator(".text .token").nth(-2)
    readout = page.inner_text(".readout")
    assert readout == f"{json.dumps(last.text_content(), ensure_ascii=False)}: " + str(
        last.get_attribute("title")
    )


def test_screen_readers_are_told_and_not_flooded(visit: Visit) -> None:
    """Catches a control without a name, and a status that is spoken at every token."""
    unnamed = visit.page.evaluate(
        "[...document.querySelectorAll('input, textarea, select, button')]"
        ".filter(e => !(e.labels?.[0] ?? e).textContent.trim()).length"
    )
    assert unnamed == 0
    visit.page.evaluate(
        "() => { window.said = []; new MutationObserver(() => said.push("
        "document.querySelector('#status').textContent)).observe("
        "document.querySelector('#status'), {childList: true}); }"
    )
    visit.ask(PROMPT)
    visit.done()
    said = visit.page.evaluate("said")
    assert len(said) == 2
    assert said[0] == "Generating…"
    assert said[1].startswith("40 tokens in")
    live = visit.page.locator("[aria-live], [role=status], [role=alert], [role=log]")
    assert live.locator(".token").count() == 0


@pytest.mark.parametrize("width", [320, 768])
def test_fits_narrow_screens(visit: Visit, width: int) -> None:
    """Catches anything that makes the page scroll sideways."""
    visit.page.set_viewport_size({"width": width, "height": 640})
    for keys in ("Control+Enter", "Control+Shift+Enter"):
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width
        visit.ask("x" * 90, keys=keys, tokens=30)
        visit.done()
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out(browser: Any, server: tuple[str, Worker], scheme: str) -> None:
    """Catches words that are hard to read in one of the two schemes (WCAG's 4.5 to 1)."""
    page = browser.new_page(color_scheme=scheme, reduced_motion="reduce")
    page.goto(server[0])
    pairs = page.evaluate(
        "['.legend .token[data-position=\"0\"]', ...[1, 2, 3, 4, 5].map(k => "
        "`.legend .token[data-position=\"${k}\"]`), '#model', '#run', '#compare', 'nav a', '#keys']"
        ".map(s => document.querySelector(s)).map(e => { const own = getComputedStyle(e);"
        "let at = e; while (getComputedStyle(at).backgroundColor === 'rgba(0, 0, 0, 0)') "
        "at = at.parentElement; return [own.color, getComputedStyle(at).backgroundColor]; })"
    )
    ratios = [contrast(*pair) for pair in pairs]
    assert min(ratios) >= 4.5
    page.close()


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours as browsers write them."""
    lights = []
    for colour in (one, other):
        shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_no_part_of_the_page_is_an_older_one(visit: Visit) -> None:
    """Catches files that a browser keeps beyond an upgrade of the server."""
    files = [r for r in visit.requests if "/static/" in r.url or r.url == f"{visit.base}/"]
    kept = {request.response().headers.get("cache-control") for request in files}
    assert len(files) == 9
    assert kept == {"no-cache"}


def test_events_may_come_torn(visit: Visit) -> None:
    """Catches characters and events lost where the network cuts a stream."""
    whole = 'data: {"a": "é→"}\r\n\r\n: still there\n\ndata: one\ndata: two\n\ndata: [DONE]\n\n'
    raw = list(whole.encode())
    expected = ['{"a": "é→"}', "one\ntwo", "[DONE]"]
    read = """async ([bytes, cuts]) => {
        const { events } = await import("/static/sse.js");
        const body = new ReadableStream({ start(controller) {
            for (const [from, to] of cuts) {
                controller.enqueue(new Uint8Array(bytes.slice(from, to)));
            }
            controller.close();
        } });
        const found = [];
        for await (const data of events(body)) found.push(data);
        return found;
    }"""
    for size in (1, 2, 3, 7, len(raw)):
        cuts = list(pairwise([*range(0, len(raw), size), len(raw)]))
        assert visit.page.evaluate(read, [raw, cuts]) == expected
