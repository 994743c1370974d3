"""The test run keeps its caches in its own folder, whatever the user has set and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_folder
from conftest import FOLDER

from passlm import provenance
from passlm.generate import compiled_folder
from passlm.kernels import native

TESTS = Path(__file__).parent
SOME = (  # our own operators, cost curves, a plot; and the same in a process that a test starts
    "test_philox.py",
    "test_profile.py::test_costs_are_measured_kept_and_told",
    "test_cli.py::test_closed_pipe_is_quiet",
)
VARIABLES = {  # each to a place in the user's cache
    "PASSLM_CACHE": "passlm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "HF_HOME": "huggingface",
    "HF_HUB_CACHE": "huggingface/hub",
    "MPLCONFIGDIR": "matplotlib",
}


def contents(folder: Path) -> dict[str, bytes]:
    """Each file below a folder with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_caches_lie_in_the_folder_of_the_run() -> None:
    """Catches a variable that is set too late to have an effect."""
    for folder in (provenance.cache_folder(), compiled_folder(), native.cache_folder()):
        assert folder.is_relative_to(FOLDER)
    from huggingface_hub import constants
    from matplotlib import get_cachedir
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name in (constants.HF_HUB_CACHE, get_cachedir(), cache_dir()):
        assert Path(name).is_relative_to(FOLDER)


@pytest.mark.slow
def test_a_filled_user_cache_is_neither_read_nor_written(tmp_path: Path) -> None:
    """Catches tests that pass or fail by what earlier programs left on the machine, and tests
    that leave something there: each file that the run keeps has a spoilt one in the user's."""
    native.available()
    user = tmp_path / "home" / ".cache"
    for name in contents(FOLDER / "passlm" / "native"):
        spoilt = user / "passlm" / "native" / name
        spoilt.parent.mkdir(parents=True, exist_ok=True)
        spoilt.write_bytes(b"spoilt")
    for place in VARIABLES.values():
        (user / place).mkdir(parents=True, exist_ok=True)
        (user / place / "kept").write_bytes(b"spoilt")
    before = contents(tmp_path / "home")
    theirs = {k: v for k, v in os.environ.items() if k != run_folder.RUN}
    theirs |= {name: str(user / place) for name, place in VARIABLES.items()}
    theirs |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(user)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SOME],
        cwd=TESTS,
        env=theirs | {run_folder.KEPT: str(FOLDER)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not native.available() or " skipped" not in done.stdout
    assert contents(tmp_path / "home") == before


def test_a_run_deletes_its_folder(tmp_path: Path) -> None:
    """Catches a machine that fills with the copies of every run."""
    theirs = {k: v for k, v in os.environ.items() if k not in (run_folder.RUN, run_folder.KEPT)}
    code = (
        "import run_folder\n"
        "folder = run_folder.enter()\n"
        "assert folder.is_dir()\n"
        "assert run_folder.enter() == folder\n"
        "print(folder)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        env=theirs | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
