"""Text in, text out: streams, stops, chats and options, over a model whose characters can tear."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest
import torch
from byte_model import CONTEXT, END, byte_generator, save_folders
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from passlm.decoding.decoder import Decoder, PromptError
from passlm.errors import InputError
from passlm.generate import Generator, load
from passlm.loading.detokenize import Decode, Detokenizer, text_behind
from passlm.params import ParameterError

METHODS = ("ar", "two-pass", "one-pass")
PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def lm() -> Generator:
    return byte_generator()


@pytest.mark.parametrize("method", METHODS)
def test_stream_joined_is_generate(lm: Generator, method: str) -> None:
    """Catches two loops that drift apart, and text lost or doubled between chunks."""
    options = {"method": method, "max_new_tokens": 40, "ignore_eos": True}
    chunks = list(lm.stream(PROMPT, **options))
    [whole] = lm.generate(PROMPT, **options)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(t for chunk in chunks for t in chunk.tokens) == whole.tokens
    assert len(whole.tokens) == 40
    assert chunks[-1].finish_reason == whole.finish_reason == "length"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert all(len(chunk.texts) == len(chunk.tokens) for chunk in chunks)


def test_methods_write_one_text(lm: Generator) -> None:
    """Catches a method that changes greedy text."""
    texts = {lm.generate(PROMPT, method=m, max_new_tokens=40)[0].tokens for m in METHODS}
    assert len(texts) == 1


def test_no_prompts_give_no_texts(lm: Generator) -> None:
    """Catches a loop over batches that fails at an empty one."""
    assert lm.generate([]) == lm.generate([], method="ar") == []


def test_batch_is_in_order_and_equals_each_alone(lm: Generator) -> None:
    """Catches texts swapped in a batch."""
    prompts = ["a", "bcd efg", "hello, world: "]
    together = lm.generate(prompts, temperature=1.0, seed=3, max_new_tokens=20)
    alone = [lm.generate(p, temperature=1.0, seed=3, max_new_tokens=20)[0] for p in prompts]
    assert [o.tokens for o in together] == [o.tokens for o in alone]
    assert [o.stats.prompt_tokens for o in together] == [1, 7, 14]


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="aé漢🙂 ,", min_size=1, max_size=12), method=st.sampled_from(METHODS))
def test_detokenizer_gives_the_text_whole(text: str, method: str) -> None:
    """Catches characters torn where their bytes fall into two tokens."""
    lm = byte_generator_once()
    ids = lm.tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(lm.decode, lm.tokenizer("prompt é")["input_ids"])
    pieces = [detokenizer.push(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def byte_fallback(ids: Sequence[int]) -> str:
    """As a tokenizer of the kind of Llama 2 reads tokens that are bytes."""
    tokens = [chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in ids]
    return str(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]).decode(tokens))


def byte_level(ids: Sequence[int]) -> str:
    """As one of the kind of GPT-2 does."""
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["🙂🙂🙂🙂", "é漢🙂é", "a🙂b🙂🙂🙂"])
@pytest.mark.parametrize("decode", [byte_fallback, byte_level])
def test_characters_in_a_row_are_read_as_they_are(decode: Decode, text: str) -> None:
    """Catches a window that begins within a character: tokenizers that fall back on bytes read
    such in a row together, all or none. And a character that the prompt left unfinished, lost."""
    ids = list(f"prompt {text}".encode())
    for cut in range(7, len(ids)):
        before = bytes(ids[:cut]).decode(errors="ignore")
        assert before + text_behind(decode, ids[:cut], ids[cut:]) == f"prompt {text}"


def test_a_prompts_broken_end_is_not_told_again() -> None:
    """Catches bytes that never become a character, given as part of the new text."""
    assert text_behind(byte_level, [*b"a\xf0"], [*b"bc"]) == "bc"


_GENERATORS: list[Generator] = []


def byte_generator_once() -> Generator:
    if not _GENERATORS:
        _GENERATORS.append(byte_generator())
    return _GENERATORS[0]


@pytest.mark.parametrize("method", METHODS)
def test_stop_string_ends_the_text_before_it(lm: Generator, method: str) -> None:
    """Catches text streamed from behind a stop, and a stop missed inside an accepted block."""
    free = lm.generate(PROMPT, max_new_tokens=60, ignore_eos=True)[0].text
    stop = free[11:14]
    cut = free[: free.index(stop)]
    chunks = list(
        lm.stream(PROMPT, method=method, stop=(stop,), max_new_tokens=60, ignore_eos=True)
    )
    assert "".join(chunk.text for chunk in chunks) == cut
    assert chunks[-1].finish_reason == "stop"
    assert lm.decode([t for c in chunks for t in c.tokens]).startswith(cut + stop)


def test_stats_count_what_was_written(lm: Generator) -> None:
    """Catches counts that include tokens behind a stop."""
    free = lm.generate(PROMPT, max_new_tokens=60, ignore_eos=True)[0].text
    [out] = lm.generate(PROMPT, stop=(free[7:10],), max_new_tokens=60, ignore_eos=True)
    assert out.stats.tokens == len(out.tokens) < 60
    assert out.stats.passes > 0
    assert out.stats.tokens_per_second > 0


def test_end_of_sequence_ends_and_is_not_shown(lm: Generator) -> None:
    """Catches an end token that is ignored, or written as text."""
    [out] = lm.generate(PROMPT, logit_bias={END: 1e4}, max_new_tokens=9)
    assert (out.tokens, out.text, out.finish_reason) == ((END,), "", "eos")


def test_context_ends_the_text(lm: Generator) -> None:
    """Catches running past the model's last position."""
    [out] = lm.generate("x" * (CONTEXT - 5), max_new_tokens=50, ignore_eos=True)
    assert (len(out.tokens), out.finish_reason) == (5, "context")


def test_chat_goes_through_the_template(lm: Generator) -> None:
    """Catches messages that reach the model as a list of nothing."""
    ids = lm.encode([{"role": "user", "content": "hi"}])
    assert lm.decode(ids) == "<user>hi<assistant>"


def test_abandoned_stream_leaves_nothing_behind(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stream that goes on computing, or changes the model, once nobody reads it."""
    before = lm.generate(PROMPT, max_new_tokens=12)[0].tokens
    passes: list[int] = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: passes.append(1) or step(self))
    stream: Iterator[object] = lm.stream(PROMPT, max_new_tokens=12)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert passes == [1]
    assert lm.generate(PROMPT, max_new_tokens=12)[0].tokens == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"method": "three-pass"}, "one of auto, ar, two-pass, one-pass"),
        ({"lookahead_tokens": 5}, "rows for 1 to 4"),
        ({"lookahead_tokens": -1}, "rows for 1 to 4"),
        ({"top_k": -3}, "top_k is -3"),
        ({"method": "ar", "lookahead_tokens": 2}, "leave lookahead_tokens out"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    lm: Generator, options: dict[str, object], said: str
) -> None:
    """Catches an option that is dropped, and an error without its cure."""
    with pytest.raises(ParameterError) as caught:
        lm.stream(PROMPT, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_and_too_long_prompts_are_refused(lm: Generator) -> None:
    """Catches a prompt that fails deep inside the model."""
    with pytest.raises(PromptError, match="empty"):
        lm.generate("")
    with pytest.raises(PromptError, match=f"context is {CONTEXT}"):
        lm.generate("x" * CONTEXT)


def test_text_and_chats_that_cannot_be_encoded_are_refused(lm: Generator) -> None:
    """Catches tracebacks of the tokenizer and of the template."""
    with pytest.raises(PromptError, match="Unicode"):
        lm.generate("half a pair: \ud800")
    strict = byte_generator()
    strict.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        strict.encode([{"role": "user", "content": "hi"}])


def test_drafting_without_files_is_refused(lm: Generator) -> None:
    """Catches a silent fall-back to plain decoding."""
    plain = Generator(lm.target, lm.tokenizer)
    assert plain.generate(PROMPT, max_new_tokens=3)[0].stats.tokens_per_pass == 1
    with pytest.raises(ParameterError, match="passlm train"):
        plain.generate(PROMPT, method="two-pass")


def test_load_from_folders(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches files that do not survive saving, and a missing look-ahead that nobody is told of."""
    model, rows = save_folders(tmp_path_factory.mktemp("byte"))
    lm = load(str(model), lookahead=rows, dtype="float32")
    assert lm.look_ahead is not None
    assert torch.equal(lm.look_ahead.embeddings, byte_generator().look_ahead.embeddings)  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING):
        assert load(str(model), dtype="float32").look_ahead is None
    assert "drafting by prompt lookup only" in caplog.text
    with pytest.raises(InputError, match="nowhere"):
        load(str(model), lookahead="nowhere", dtype="float32")
