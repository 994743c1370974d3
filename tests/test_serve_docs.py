"""What docs/serving.md and the files of deploy/ say of the server is what it does."""

import argparse
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra 'serve'")

from passlm.cli import serve
from passlm.cli.common import add_decoding_arguments, add_model_arguments
from passlm.serve.metrics import Metrics
from passlm.serve.protocol import WorkerSettings, WorkerState
from passlm.serve.run import LAST_SECONDS
from passlm.serve.settings import ServeSettings

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
UNIT = (ROOT / "deploy" / "passlm.service").read_text(encoding="utf-8")
NGINX = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")


def flags(*adders: object) -> dict[str, object]:
    """Flags and their defaults."""
    parser = argparse.ArgumentParser()
    for add in adders:
        add(parser)  # type: ignore[operator]
    return {action.option_strings[0]: action.default for action in parser._actions}


def test_every_flag_is_described() -> None:
    """Catches a flag of the server that its page does not know."""
    own = (
        flags(serve.add_arguments).keys()
        - flags(add_model_arguments, add_decoding_arguments).keys()
    )
    assert {flag for flag in own if f"`{flag}`" not in PAGE} == set()


def test_every_metric_is_described() -> None:
    """Catches a metric that its page does not know, or knows by another name."""
    nothing = [False if field.type == "bool" else 0 for field in fields(WorkerState)]
    metrics = Metrics(lambda: WorkerState(*nothing))  # type: ignore[arg-type]
    text = metrics.exposition()[0].decode()
    kinds = dict(re.findall(r"^# TYPE (passlm_\S+) (\w+)$", text, re.MULTILINE))
    told = {name for name in kinds if not name.endswith("_created")}
    described = set(re.findall(r"`(passlm_\w+)`", PAGE))
    assert described == told


def test_limits_fit_together() -> None:
    """Catches a proxy or a service manager that cuts off what the server allows."""
    settings, worker = ServeSettings(model_name="x"), WorkerSettings()
    grace = flags(serve.add_arguments)["--grace-seconds"]
    stop = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    read = re.search(r"proxy_read_timeout (\d+)s;", NGINX)
    assert stop is not None
    assert read is not None
    assert int(stop[1]) > float(str(grace)) + LAST_SECONDS
    assert int(read[1]) > worker.max_seconds
    assert "client_max_body_size 1m;" in NGINX
    assert settings.max_body == 1 << 20


def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    """Catches a setting that systemd does not know."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze to read the unit")
    unit = tmp_path / "passlm.service"
    unit.write_text(UNIT.replace("/opt/passlm/bin/passlm", "/bin/true"))
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
