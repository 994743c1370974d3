"""The folder of a test run, which holds every cache that the tests and their processes write.

`conftest.py` calls `enter` before torch, transformers or passlm are imported. The workers of
pytest-xdist and the processes that tests start inherit the environment, so all of them share the
folder: our own operators are compiled once in a run, and the packaged model is converted once.

The folder is new for each run and is deleted afterwards. Set `PASSLM_TEST_CACHE` to a folder to
keep it and to start later runs faster.
"""

from __future__ import annotations

import atexit
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

KEPT = "PASSLM_TEST_CACHE"
RUN = "PASSLM_TEST_RUN"  # set by the process that made the folder
_HUB = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")  # their caches have a variable each


def enter() -> Path:
    """Point the caches of this process, and of those it starts, to the folder of the test run.

    The process that makes a folder deletes it as it ends.
    """
    inherited, kept = os.environ.get(RUN), os.environ.get(KEPT)
    folder = Path(inherited or kept or mkdtemp(prefix="passlm-tests-")).absolute()
    if not (inherited or kept):
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in [*os.environ]:
        if name.startswith(_HUB) and name.endswith("_CACHE"):
            del os.environ[name]
    os.environ |= {
        RUN: str(folder),
        "PASSLM_CACHE": str(folder / "passlm"),
        "XDG_CACHE_HOME": str(folder / "xdg"),
        "HF_HOME": str(folder / "huggingface"),
        "TORCH_HOME": str(folder / "torch"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        # The models are so small that a second thread only costs, and workers share the cores.
        "OMP_NUM_THREADS": "1",
    }
    (folder / "matplotlib").mkdir(parents=True, exist_ok=True)
    return folder
