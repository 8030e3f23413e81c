"""`kvferry serve` on the command line: what passes through, and what is said in one line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.codec.mlx.openblas import GUARD

pytestmark = pytest.mark.processes


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvferry", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {GUARD: "1"} | environment,
    )


def ours(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("kvferry:")]


def test_help_is_ours_and_mlx_lms_behind_a_double_dash() -> None:
    own = serve("--help")
    assert own.returncode == 0
    assert "--socket" in own.stdout
    theirs = serve("--", "--help")
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stdout.startswith("usage: kvferry serve")
    assert "--prompt-cache-bytes" in theirs.stdout


def test_what_mlx_lm_refuses_is_bad_usage(tmp_path: Path) -> None:
    done = serve("--socket", str(tmp_path / "n.sock"), "--port", "many")
    assert done.returncode == 2
    assert "argument --port: invalid int value: 'many'" in done.stderr
    done = serve("--socket", str(tmp_path / "n.sock"), "--no-such-option", "3")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr


def test_a_model_that_is_not_there_ends_it_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = serve(
        "--model", str(tmp_path / "empty"), "--socket", str(tmp_path / "n.sock"),
        "--port", str(free_port()),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "the model cannot be loaded" in ours(done)[-1]


def test_a_port_that_is_taken_ends_it_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = serve("--socket", str(tmp_path / "n.sock"), "--port", str(port))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "--port" in ours(done)[-1]
