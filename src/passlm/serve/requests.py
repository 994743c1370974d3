"""Turn API requests into worker requests, and check the limits of the server and the model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from passlm.generate import Generator, Options
from passlm.generate import Prompt as PromptInput
from passlm.params import SamplingParams, StopParams
from passlm.serve.errors import ApiError
from passlm.serve.protocol import SequenceRequest
from passlm.serve.request_schema import (
    ChatRequest,
    CommonRequest,
    CompletionRequest,
    LookAhead,
    Message,
)
from passlm.serve.settings import ServeSettings

DEFAULT_COMPLETION_TOKENS = 16  # the default of OpenAI's API
_SEEDS = 2**64


@dataclass(frozen=True)
class GenerationRequest:
    """A request of the API, checked and tokenized.

    Attributes:
        sequences: the sequences to generate: `n` for the first prompt, then `n` for the second, ...
        n: sequences per prompt.
        echoes: text to return before the generated text, one per prompt.
        show: also return whether each token was drawn or accepted, and at which position.
    """

    sequences: tuple[SequenceRequest, ...]
    n: int
    echoes: tuple[str, ...]
    show: bool

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts; each prompt counts once, whatever `n` is."""
        return sum(len(sequence.prompt) for sequence in self.sequences[:: self.n])


class RequestReader:
    """Reads and tokenizes requests.

    Not thread-safe: a tokenizer may be used by one thread at a time. The time of a call grows with
    the length of the prompts.

    Args:
        lm: the served model.
        settings: limits of a request.
        max_context: maximum length of a sequence, prompt and answer, in tokens.
    """

    def __init__(self, lm: Generator, settings: ServeSettings, max_context: int) -> None:
        self.lm = lm
        self.settings = settings
        self._max_prompt_tokens = max_context - 1
        if settings.max_prompt_tokens:
            self._max_prompt_tokens = min(self._max_prompt_tokens, settings.max_prompt_tokens)

    def completion(self, request: CompletionRequest) -> GenerationRequest:
        """Read a completion request.

        Raises:
            ApiError: a limit of the server is exceeded, or fields contradict each other.
            InputError: the model does not support the request.
        """
        self._check(request)
        n = request.n or 1
        if (request.best_of or n) != n:
            raise ApiError(
                400, f"best_of is {request.best_of} and n is {n}: make them equal", "best_of"
            )
        if request.echo and request.logprobs is not None:
            raise ApiError(
                400,
                "echo and logprobs cannot be combined, because log probabilities "
                "of the prompt are not computed: leave one of them out",
                "echo",
            )
        prompts = _prompt_list(request.prompt)
        self._check_n(len(prompts) * n)
        new = self._new_tokens("max_tokens", request.max_tokens or DEFAULT_COMPLETION_TOKENS)
        encoded = [self._encode(prompt, "prompt") for prompt in prompts]
        echoes = tuple(self._prompt_text(prompt) if request.echo else "" for prompt in prompts)
        return self._generation_request(request, encoded, new, request.logprobs, echoes)

    def chat(self, request: ChatRequest) -> GenerationRequest:
        """Read a chat request.

        Raises:
            ApiError: a limit of the server is exceeded, or fields contradict each other.
            InputError: the model does not support the request.
        """
        self._check(request)
        self._check_n(request.n or 1)
        name, new = self._max_new_tokens(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        prompt = self._encode([self._message(message) for message in request.messages], "messages")
        return self._generation_request(
            request, [prompt], self._new_tokens(name, new), logprobs, ("",)
        )

    def _max_new_tokens(self, request: ChatRequest) -> tuple[str, int]:
        given = {
            name: value
            for name in ("max_completion_tokens", "max_tokens")
            if (value := getattr(request, name)) is not None
        }
        if len(set(given.values())) > 1:
            raise ApiError(
                400,
                "max_completion_tokens and max_tokens mean the same and differ: give one of them",
            )
        return next(iter(given.items()), ("max_completion_tokens", self.settings.max_tokens))

    def _message(self, message: Message) -> dict[str, str]:
        parts = message.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        entry = {"role": self._role(message.role), "content": text}
        optional = {"name": message.name, "tool_call_id": message.tool_call_id}
        return entry | {key: value for key, value in optional.items() if value is not None}

    def _role(self, role: str) -> str:
        """Return the role for the template: `developer` becomes `system` in one that lacks it."""
        template = str(self.lm.tokenizer.chat_template or "")
        return "system" if role == "developer" and role not in template else role

    def _check(self, request: CommonRequest) -> None:
        """Check what does not depend on the prompt."""
        name, limit = self.settings.model_name, self.settings.max_stops
        if request.model != name:
            raise ApiError(
                404,
                f"there is no model {request.model[:80]!r}: this server serves {name!r}",
                "model",
                "model_not_found",
            )
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        stops = _stops(request)
        if len(stops) > limit:
            raise ApiError(
                400, f"stop has {len(stops)} strings: at most {limit} are allowed", "stop"
            )
        self._check_bias(request.logit_bias or {})

    def _check_bias(self, bias: dict[str, float]) -> None:
        limit = self.settings.max_logit_bias
        if len(bias) > limit:
            raise ApiError(
                400, f"logit_bias has {len(bias)} tokens: at most {limit} are allowed", "logit_bias"
            )
        self._check_ids(map(int, bias), "logit_bias")

    def _check_n(self, n: int) -> None:
        limit = self.settings.max_texts
        if n > limit:
            raise ApiError(
                400,
                f"the request has {n} sequences, prompts times n: at most {limit} are allowed",
                "n",
            )

    def _new_tokens(self, name: str, tokens: int) -> int:
        limit = self.settings.max_tokens
        if tokens > limit:
            raise ApiError(
                400, f"{name} is {tokens}: at most {limit} are allowed", name, "invalid_value"
            )
        return tokens

    def _encode(self, prompt: PromptInput, name: str) -> tuple[int, ...]:
        ids = tuple(self.lm.encode(prompt))
        if len(ids) > self._max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens: at most {self._max_prompt_tokens} are allowed",
                name,
                "context_length_exceeded",
            )
        self._check_ids(ids, name)
        return ids

    def _check_ids(self, ids: Iterable[int], name: str) -> None:
        vocabulary = self.lm.target.vocabulary
        unknown = next((token for token in ids if token >= vocabulary), None)
        if unknown is not None:
            raise ApiError(
                400,
                f"{name} contains token id {unknown}: the model has ids 0 to {vocabulary - 1}",
                name,
            )

    def _prompt_text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.lm.decode(prompt)

    def _generation_request(
        self,
        request: CommonRequest,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        logprobs: int | None,
        echoes: tuple[str, ...],
    ) -> GenerationRequest:
        n, look_ahead = request.n or 1, request.lookahead or LookAhead()
        stopping = StopParams(max_new_tokens=new_tokens, stop=_stops(request))
        options = [
            Options.checked(
                self.lm.look_ahead,
                SamplingParams(**_sampling(request), seed=_seed(request, index)),
                stopping,
                look_ahead.method,
                look_ahead.tokens,
            )
            for index in range(n)
        ]
        sequences = tuple(
            SequenceRequest(prompt, option, logprobs) for prompt in prompts for option in options
        )
        return GenerationRequest(sequences, n, echoes, bool(look_ahead.show))


def _prompt_list(prompt: Any) -> list[Any]:
    """Return the prompts of a completion request as a list, also if it has only one."""
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if single else prompt


def _stops(request: CommonRequest) -> tuple[str, ...]:
    stop = request.stop or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _seed(request: CommonRequest, index: int) -> int | None:
    return None if request.seed is None else (request.seed + index) % _SEEDS


def _sampling(request: CommonRequest) -> dict[str, Any]:
    """Return the fields of `SamplingParams` except the seed.

    The default temperature is 1, as in OpenAI's API.
    """
    names = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: getattr(request, name) for name in names}
    chosen = {name: value for name, value in given.items() if value is not None}
    chosen["temperature"] = 1.0 if request.temperature is None else request.temperature
    if request.top_p is not None:
        # The API allows 0, which keeps only the most probable token.
        chosen["top_p"] = max(request.top_p, sys.float_info.min)
    if request.logit_bias:
        chosen["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
    return chosen
