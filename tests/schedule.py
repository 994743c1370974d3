"""Distribution of the tests over the workers of pytest-xdist (`-n 2`).

A file is run by one worker, so that what its fixtures make is made once; the files that take
longest are started first, so that no worker is left with a long one at the end. Some tests of
several files form one group, because they use the costs that were measured for the same model.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

LONGEST = (
    *("wheel", "compiled", "readme", "commands", "serve_model", "packaged model", "distribution"),
    *("processes", "lossless", "serve_command", "products", "gguf_copy", "quantize", "page"),
    *("decode_sampling", "serve_recipes", "devices", "run_folder", "train_command", "bench_resume"),
)
GROUPS = {
    "test_advise.py::test_two_prompts_of_the_real_model": "packaged model",
    "test_exact.py::test_the_packaged_model_writes_what_plain_decoding_writes": "packaged model",
}


def group(nodeid: str) -> str:
    """Return the group of a test: its file's name, or one that is named above."""
    test = nodeid.split("[")[0].rpartition("/")[2]
    return GROUPS.get(test, test.split(".")[0].removeprefix("test_"))


def rank(nodeid: str) -> int:
    """Return the place of a test's group in the order of the run."""
    name = group(nodeid)
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


class LongestFirst(LoadScopeScheduling):
    """Groups of tests, of which the longest are started first."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
