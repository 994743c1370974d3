"""Run another engine in this process; `external.py` starts it with that engine's own Python.

This file runs as a script, so it needs only the standard library and the engine, and works with
Python 3.8 and later. Each line of JSON on standard input is answered by a line of JSON on standard
output. The first line describes the model, each later one a prompt. Prompts and answers are token
ids, and a prompt is timed from its ids to its last new id. The engine's own output goes to standard
error. The end of standard input means that the parent process is gone; this process then ends, even
in the middle of a request.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

BLOCK = 1024  # tokens by which llama.cpp's KV cache grows
GPU_MEMORY_SHARE = 0.5  # vLLM's share of GPU memory, which also holds the benchmark's own model
GRACE_SECONDS = 4.0  # time for an engine to finish its current request


class LlamaCpp:
    """llama.cpp through `llama-cpp-python`, which reads the GGUF file directly."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.library: Any = importlib.import_module("llama_cpp")
        self.settings = settings
        self.model = self._open(BLOCK)

    def facts(self) -> dict[str, Any]:
        """Return the version, and GGUF's number for the data type of the weights."""
        kind = self.model.metadata.get("general.file_type")
        return {"version": self.library.__version__, "file_type": kind}

    def prepare(self, request: dict[str, Any]) -> None:
        """Make room in the KV cache for a request.

        This is not timed, because the allocation of the other methods' caches is not timed either.
        """
        needed = len(request["ids"]) + request["max_new_tokens"]
        if needed > self.model.n_ctx():
            self.model.close()
            self.model = self._open(-(-needed // BLOCK) * BLOCK)

    def tokens(self, request: dict[str, Any]) -> Iterator[int]:
        """Yield the new ids, including the one that ends the sequence."""
        self.model.reset()  # reuses nothing of the previous prompt
        sampler = self._sampler(request)
        try:
            self.model.eval(request["ids"])
            for left in reversed(range(request["max_new_tokens"])):
                token = self.library.llama_sampler_sample(sampler, self.model.ctx, -1)
                yield token
                if token in request["eos"] or not left:
                    return
                self.model.eval([token])
        finally:
            self.library.llama_sampler_free(sampler)

    def _open(self, capacity: int) -> Any:
        return self.library.Llama(
            model_path=self.settings["model"],
            n_ctx=capacity,
            n_threads=self.settings["threads"],
            n_threads_batch=self.settings["threads"],
            n_gpu_layers=-1 if self.settings["gpu"] else 0,
            verbose=False,
        )

    def _sampler(self, request: dict[str, Any]) -> Any:
        """Return a sampler that applies temperature first, as transformers does.

        The library's own sampler applies it last.
        """
        c = self.library
        if request["temperature"] == 0:
            links = [c.llama_sampler_init_greedy()]
        else:
            links = [c.llama_sampler_init_temp(request["temperature"])]
            if request["top_k"]:
                links.append(c.llama_sampler_init_top_k(request["top_k"]))
            if request["top_p"] < 1:
                links.append(c.llama_sampler_init_top_p(request["top_p"], 1))
            if request["min_p"] > 0:
                links.append(c.llama_sampler_init_min_p(request["min_p"], 1))
            links.append(c.llama_sampler_init_dist(request["seed"] % 2**32))
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        for link in links:
            c.llama_sampler_chain_add(chain, link)
        return chain


class Vllm:
    """vLLM on a transformers model, one request at a time and without prefix caching.

    vLLM applies `min_p` before `top_p`; the other methods apply it after `top_p`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.library: Any = importlib.import_module("vllm")
        arguments = self.library.EngineArgs(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["context"],
            max_num_seqs=1,
            enable_prefix_caching=False,
            gpu_memory_utilization=GPU_MEMORY_SHARE,
            disable_log_stats=True,
        )
        self.engine = self.library.LLMEngine.from_engine_args(arguments)
        self.requests = 0

    def facts(self) -> dict[str, Any]:
        """Return the version."""
        return {"version": self.library.__version__}

    def prepare(self, request: dict[str, Any]) -> None:
        """Do nothing, since the KV cache has room for the model's whole context."""

    def tokens(self, request: dict[str, Any]) -> Iterator[int]:
        """Yield the new ids, including the one that ends the sequence."""
        settings = self.library.SamplingParams(
            temperature=request["temperature"],
            top_k=request["top_k"] or -1,
            top_p=request["top_p"],
            min_p=request["min_p"],
            seed=request["seed"] % 2**32,
            max_tokens=request["max_new_tokens"],
            # Ignores the model's own end tokens; all methods use those of the request instead.
            ignore_eos=True,
            stop_token_ids=request["eos"],
            detokenize=False,
        )
        self.requests += 1
        self.engine.add_request(str(self.requests), {"prompt_token_ids": request["ids"]}, settings)
        yielded = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                written = output.outputs[0].token_ids
                yield from written[yielded:]
                yielded = len(written)


ENGINES: dict[str, Any] = {"llama-cpp": LlamaCpp, "vllm": Vllm}
PACKAGES = {"llama-cpp": "llama_cpp", "vllm": "vllm"}


def decode(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Decode one prompt and measure the time."""
    engine.prepare(request)
    tokens, first = [], None
    begun = time.perf_counter()
    for token in engine.tokens(request):
        if first is None:
            first = time.perf_counter() - begun
        tokens.append(int(token))
    seconds = time.perf_counter() - begun
    return {"tokens": tokens, "seconds": seconds, "first_token_seconds": first}


def load_engine(name: str, settings: dict[str, Any]) -> Any:
    """Load the engine with its model; return None if its package is not installed."""
    try:
        importlib.import_module(PACKAGES[name])
    except ModuleNotFoundError as error:
        if error.name == PACKAGES[name]:
            return None
        raise  # the package is installed, but one of its dependencies is missing
    return ENGINES[name](settings)


def serve(name: str, requests: queue.Queue[dict[str, Any] | None], answers: TextIO) -> None:
    """Answer requests until None arrives."""
    engine = None
    for request in iter(requests.get, None):
        if engine is None:
            engine = load_engine(name, request)
            answer = {"missing": True} if engine is None else engine.facts()
        else:
            answer = decode(engine, request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def read(lines: TextIO, requests: queue.Queue[dict[str, Any] | None]) -> None:
    """Put requests into the queue; end the process when the input ends.

    A request in progress has `GRACE_SECONDS` to finish.
    """
    for line in lines:
        requests.put(json.loads(line))
    requests.put(None)
    time.sleep(GRACE_SECONDS)
    os._exit(0)


def main() -> None:
    """Answer the requests of the parent process."""
    here = os.path.dirname(os.path.abspath(__file__))
    # Python puts this folder first on the path, where its modules would shadow others of the same
    # name.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=read, args=(sys.stdin, requests), daemon=True).start()
    try:
        serve(sys.argv[1], requests, answers)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the reading thread blocks and would keep the process alive


if __name__ == "__main__":
    main()
