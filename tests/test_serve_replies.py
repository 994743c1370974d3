"""From pieces to replies: streams joined are whole replies, tokens are spelt in bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

import pytest
from byte_model import byte_generator, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from passlm.generate import Options
from passlm.outputs import Stats
from passlm.params import SamplingParams, StopParams
from passlm.serve.protocol import Job, SequenceOutput, SequenceRequest, Token
from passlm.serve.requests import GenerationRequest
from passlm.serve.response_builder import ChatBuilder, CompletionBuilder, ResponseBuilder, usage
from passlm.serve.token_bytes import TokenBytes

SPELLING = TokenBytes(byte_tokenizer())
IDS = dict(zip(ascii_lowercase, byte_tokenizer()(ascii_lowercase)["input_ids"], strict=True))


def wanted(
    texts: int, logprobs: int | None, show: bool = False, echo: str = ""
) -> GenerationRequest:
    options = Options(SamplingParams(), StopParams(), "ar", 0)
    return GenerationRequest(
        (SequenceRequest((1, 2), options, logprobs),) * texts, texts, (echo,), show
    )


def used() -> Any:
    asked = wanted(1, None)
    return usage(asked, [Job(asked.sequences[0], 0, lambda *_: None)])


def token(letter: str, text: str | None = None, position: int = 0) -> Token:
    """A letter; its text may come late, or be cut."""
    top = ((IDS[letter], -0.5), (IDS["z"], -1.5))
    return Token(IDS[letter], letter if text is None else text, position, -0.5, top)


def streamed(
    builder: ResponseBuilder, pieces: Sequence[tuple[int, SequenceOutput]]
) -> list[dict[str, Any]]:
    return [json.loads(chunk) for index, piece in pieces for chunk in builder.chunks(index, piece)]


def pieces() -> st.SearchStrategy[list[tuple[int, SequenceOutput]]]:
    """Pieces of two texts, mixed, whose tokens show their letters at once or later."""
    letters = st.text(st.sampled_from("abc"), min_size=1, max_size=4)
    one = st.tuples(st.integers(0, 1), letters, st.integers(0, 3))

    def made(plan: list[tuple[int, str, int]]) -> list[tuple[int, SequenceOutput]]:
        held, out = ["", ""], []
        for index, word, late in plan:
            tokens = []
            for place, letter in enumerate(word):
                held[index] += letter
                shown = "" if place < late else held[index]
                held[index] = held[index] if place < late else ""
                tokens.append(token(letter, shown, place))
            out.append((index, SequenceOutput(tuple(tokens))))
        ends = [(index, SequenceOutput((), "length")) for index in (0, 1)]
        return [*out, *ends]

    return st.lists(one, max_size=6).map(made)


@given(pieces(), st.booleans(), st.booleans())
def test_a_completion_stream_joined_is_the_whole_reply(
    parts: list[tuple[int, SequenceOutput]], logprobs: bool, show: bool
) -> None:
    """Catches text or log-probabilities that are lost, doubled or moved in a stream."""
    asked = wanted(2, 2 if logprobs else None, show, echo="echo ")
    whole = CompletionBuilder(asked, "m", SPELLING, False)
    for index, piece in parts:
        whole.add(index, piece)
    reply = json.loads(whole.response(used()).model_dump_json())
    chunks = streamed(CompletionBuilder(asked, "m", SPELLING, False), parts)
    for index, choice in enumerate(reply["choices"]):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"]
        assert own[-1]["finish_reason"] == "length"
        if logprobs:
            for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                joined = [entry for c in own if c["logprobs"] for entry in c["logprobs"][key]]
                assert joined == choice["logprobs"][key]
            text = choice["text"].removeprefix("echo ")
            offsets = [*choice["logprobs"]["text_offset"], len(text)]
            cut = [text[a:b] for a, b in pairwise(offsets)]
            assert "".join(cut) == text
    Completion.model_validate(reply, strict=True)


@given(pieces(), st.booleans(), st.booleans())
def test_a_chat_stream_joined_is_the_whole_reply(
    parts: list[tuple[int, SequenceOutput]], logprobs: bool, show: bool
) -> None:
    """Catches the same in chats, and replies that the official client's types do not allow."""
    asked = wanted(2, 2 if logprobs else None, show)
    whole = ChatBuilder(asked, "m", SPELLING, False)
    for index, piece in parts:
        whole.add(index, piece)
    reply = json.loads(whole.response(used()).model_dump_json())
    chunks = streamed(ChatBuilder(asked, "m", SPELLING, True), parts)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk["usage"] is None
    for index, choice in enumerate(reply["choices"]):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        deltas = [c["delta"] for c in own]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[-1] == {}
        assert "".join(d.get("content", "") for d in deltas) == choice["message"]["content"]
        if logprobs:
            joined = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert joined == choice["logprobs"]["content"]
    ChatCompletion.model_validate(reply, strict=True)


def test_each_chunk_shows_its_pass() -> None:
    """Catches a token that the page cannot colour, and a pass that is not told."""
    parts = [
        (0, SequenceOutput((token("a", position=1), token("b", "", 2), token("c", "bc", 0)))),
        (0, SequenceOutput((token("a", "", 0),))),
        (0, SequenceOutput((token("b", "ab", 0),), "eos")),
    ]
    chunks = streamed(CompletionBuilder(wanted(1, None, show=True), "m", SPELLING, False), parts)
    shown = [c["choices"][0]["passlm"] for c in chunks if "passlm" in c["choices"][0]]
    assert [s["positions"] for s in shown] == [[1, 2, 0], [0], [0]]
    assert [s["texts"] for s in shown] == [["a", "", "bc"], [""], ["ab"]]
    plain = streamed(CompletionBuilder(wanted(1, None), "m", SPELLING, False), parts)
    assert not any("passlm" in c["choices"][0] for c in plain)


def test_what_a_stop_string_is_made_of_is_not_told() -> None:
    """Catches log-probabilities of tokens that are no part of the text."""
    builder = ChatBuilder(wanted(1, 0), "m", SPELLING, False)
    builder.add(0, SequenceOutput((token("a"), token("b", "")), None))
    builder.add(0, SequenceOutput((token("c", ""),), "stop"))
    reply = builder.response(used())
    content = json.loads(reply.model_dump_json())["choices"][0]
    assert content["message"]["content"] == "a"
    assert [entry["token"] for entry in content["logprobs"]["content"]] == ["a"]
    assert content["finish_reason"] == "stop"


@pytest.mark.parametrize("held", [True, False])
def test_the_end_is_not_told(held: bool) -> None:
    """Catches an end-of-sequence token among those of the text, where text was held back, and text
    that is lost with it."""
    builder = CompletionBuilder(wanted(1, 0), "m", SPELLING, False)
    builder.add(0, SequenceOutput((token("a"), *([token("b", "")] if held else []))))
    builder.add(0, SequenceOutput((token("z", "b" if held else "c"),), "eos"))
    choice = json.loads(builder.response(used()).model_dump_json())["choices"][0]
    assert choice["text"] == ("ab" if held else "ac")
    assert choice["logprobs"]["tokens"] == (["a", "b"] if held else ["a"])
    assert choice["logprobs"]["text_offset"] == ([0, 1] if held else [0])
    assert choice["finish_reason"] == "stop"


def test_a_token_that_cannot_come_has_a_number() -> None:
    """Catches minus infinity, which JSON does not have."""
    builder = ChatBuilder(wanted(1, 1), "m", SPELLING, False)
    builder.add(
        0, SequenceOutput((Token(IDS["a"], "a", 0, -math.inf, ((1, -math.inf),)),), "length")
    )
    text = builder.response(used()).model_dump_json()
    entry = json.loads(text)["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


def test_usage_counts_prompts_once() -> None:
    """Catches prompts that are billed for each of their texts."""
    options = Options(SamplingParams(), StopParams(), "ar", 0)
    sequences = tuple(
        SequenceRequest(prompt, options) for prompt in ((1,), (1,), (1, 2, 3), (1, 2, 3))
    )
    jobs = [Job(ask, index, lambda *_: None) for index, ask in enumerate(sequences)]
    for job, reused in zip(jobs, (0, 1, 2, 3), strict=True):
        job.reused = reused
        job.stats = Stats(tokens=5, passes=2, judged_by_position=[2], accepted_by_position=[1])
    total = usage(GenerationRequest(sequences, 2, ("", ""), False), jobs)
    assert (total.prompt_tokens, total.completion_tokens, total.total_tokens) == (4, 20, 24)
    assert total.prompt_tokens_details.cached_tokens == 2
    assert (total.passlm.passes, total.passlm.accepted) == (8, 4)
    assert total.passlm.accepted_by_position == [4]
    assert total.passlm.tokens_per_pass == 2.5


@given(st.text(min_size=1, max_size=12))
def test_bytes_of_tokens_make_up_the_text(text: str) -> None:
    """Catches a byte alphabet with a letter out of place."""
    ids = byte_tokenizer()(text)["input_ids"]
    spelt = [SPELLING(i) for i in ids]
    assert b"".join(spell for _, spell in spelt) == text.encode()
    for shown, spell in spelt:
        assert shown.encode() == spell or shown == "".join(f"\\x{byte:02x}" for byte in spell)


def test_special_tokens_are_spelt_out() -> None:
    """Catches the end of a text spelt in GPT-2's letters."""
    assert SPELLING(256) == ("<end>", b"<end>")
    assert SPELLING(10**6) == ("", b"")  # of a vocabulary that is filled up


def test_sentencepiece_tokens_are_spelt_in_bytes() -> None:
    """Catches spaces shown as underscores, and byte tokens shown by their names."""
    vocabulary = {"<unk>": 0, "\u2581the": 1, "<0xE2>": 2, "a": 3}
    model = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    spelling = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=model))
    assert spelling(1) == (" the", b" the")
    assert spelling(2) == ("\\xe2", b"\xe2")
    assert spelling(3) == ("a", b"a")


def test_the_real_tokens_of_a_text_are_spelt() -> None:
    """Catches a spelling that differs from the decoder's for what a model writes."""
    lm = byte_generator()
    tokens = lm.generate("hello", max_new_tokens=40)[0].tokens
    spelt = b"".join(SPELLING(i)[1] for i in tokens if i not in lm.eos)
    assert spelt.decode("utf-8", "replace") == lm.decode(tokens)


@pytest.mark.model
def test_smollm2_is_spelt() -> None:
    """Catches a real vocabulary with pieces that nobody thought of."""
    from passlm.loading.models import load_model

    tokenizer = load_model("smollm2-135m").tokenizer
    spelling = TokenBytes(tokenizer)
    text = "def f(x):\n\treturn 'naïve \U0001f600 \u2581 …'"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(spelling(i)[1] for i in ids) == text.encode()
