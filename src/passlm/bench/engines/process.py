"""Another engine at work: what `external.py` starts with that engine's own Python.

Run as a script, so it needs the standard library and the engine alone, and any Python from 3.8 on.
A line of JSON comes on standard input, a line goes back: first the model, then one prompt after the
other, ids to ids; a prompt is timed from its ids to its last new id. Whatever the engine prints
goes to standard error. The end of standard input is the end of whoever started this, and ends it,
in the middle of a text as well.
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

BLOCK = 1024  # tokens by which llama.cpp's cache grows
GPU_MEMORY_SHARE = 0.5  # that vLLM takes of a GPU, for the bench's own model is there as well
GRACE_SECONDS = 4.0  # for an engine to end what it has begun


class LlamaCpp:
    """llama.cpp through `llama-cpp-python`, on a GGUF file as it is."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.library: Any = importlib.import_module("llama_cpp")
        self.settings = settings
        self.model = self._open(BLOCK)

    def facts(self) -> dict[str, Any]:
        """The version, and the number by which GGUF names the weights' type."""
        kind = self.model.metadata.get("general.file_type")
        return {"version": self.library.__version__, "file_type": kind}

    def prepare(self, request: dict[str, Any]) -> None:
        """Make room for a text, which is not timed, as none of the other methods' caches is."""
        needed = len(request["ids"]) + request["max_new_tokens"]
        if needed > self.model.n_ctx():
            self.model.close()
            self.model = self._open(-(-needed // BLOCK) * BLOCK)

    def tokens(self, request: dict[str, Any]) -> Iterator[int]:
        """New ids, the one that ends the text among them."""
        self.model.reset()  # nothing of the prompt before is taken over
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
        """Transformers' order, temperature first: the library's own sampler has it last."""
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
    """vLLM on a model of transformers, one text at a time and nothing kept between texts.

    vLLM drops what `min_p` drops before it counts `top_p`, the others behind it.
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
        self.texts = 0

    def facts(self) -> dict[str, Any]:
        """The version."""
        return {"version": self.library.__version__}

    def prepare(self, request: dict[str, Any]) -> None:
        """Nothing: its cache has room for the model's whole context."""

    def tokens(self, request: dict[str, Any]) -> Iterator[int]:
        """New ids, the one that ends the text among them."""
        settings = self.library.SamplingParams(
            temperature=request["temperature"],
            top_k=request["top_k"] or -1,
            top_p=request["top_p"],
            min_p=request["min_p"],
            seed=request["seed"] % 2**32,
            max_tokens=request["max_new_tokens"],
            ignore_eos=True,  # the model's own; those of the request are the others' too
            stop_token_ids=request["eos"],
            detokenize=False,
        )
        self.texts += 1
        self.engine.add_request(str(self.texts), {"prompt_token_ids": request["ids"]}, settings)
        told = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                written = output.outputs[0].token_ids
                yield from written[told:]
                told = len(written)


ENGINES: dict[str, Any] = {"llama-cpp": LlamaCpp, "vllm": Vllm}
PACKAGES = {"llama-cpp": "llama_cpp", "vllm": "vllm"}


def decode(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One prompt, timed."""
    engine.prepare(request)
    tokens, first = [], None
    begun = time.perf_counter()
    for token in engine.tokens(request):
        if first is None:
            first = time.perf_counter() - begun
        tokens.append(int(token))
    seconds = time.perf_counter() - begun
    return {"tokens": tokens, "seconds": seconds, "first_token_seconds": first}


def started(name: str, settings: dict[str, Any]) -> Any:
    """The engine with its model; None where its package is not installed."""
    try:
        importlib.import_module(PACKAGES[name])
    except ModuleNotFoundError as error:
        if error.name == PACKAGES[name]:
            return None
        raise  # it is installed and lacks something
    return ENGINES[name](settings)


def serve(name: str, requests: queue.Queue[dict[str, Any] | None], answers: TextIO) -> None:
    """Answer requests for as long as they come."""
    engine = None
    for request in iter(requests.get, None):
        if engine is None:
            engine = started(name, request)
            answer = {"missing": True} if engine is None else engine.facts()
        else:
            answer = decode(engine, request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def read(lines: TextIO, requests: queue.Queue[dict[str, Any] | None]) -> None:
    """Pass on what is asked; when nobody can ask any more, end, if need be in mid-text."""
    for line in lines:
        requests.put(json.loads(line))
    requests.put(None)
    time.sleep(GRACE_SECONDS)
    os._exit(0)


def main() -> None:
    """Work for whoever started this process."""
    here = os.path.dirname(os.path.abspath(__file__))
    # This folder comes first on the path, and its modules would hide others of the same name.
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
        os._exit(1)  # the thread that reads cannot be woken


if __name__ == "__main__":
    main()
