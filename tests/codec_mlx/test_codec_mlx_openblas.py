"""OpenBLAS gets into processes that run the model, once, and its absence is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvferry.codec.mlx import openblas

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
PROGRAM = """
import os, sys
from kvferry.codec.mlx import openblas
{patch}
openblas.ensure_openblas()
assert "mlx.core" not in sys.modules
print(os.getpid(), sys.argv[1:], os.environ.get("LD_PRELOAD", ""))
"""


def ran(patch: str = "", **extra: str) -> tuple[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", openblas.GUARD)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(patch=patch), "one", "two words"],
        env=environment | extra,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, done.stderr


@linux
def test_the_process_starts_again_with_it_and_keeps_its_arguments() -> None:
    library = openblas.find_openblas()
    if library is None:
        pytest.skip("no OpenBLAS here")
    out, err = ran()
    assert out.count("\n") == 1
    assert "['one', 'two words']" in out
    assert out.rstrip().endswith(str(library))
    assert err == ""


@linux
def test_its_absence_is_said_once_with_the_remedy() -> None:
    out, err = ran("openblas.find_openblas = lambda: None; openblas.ensure_openblas()")
    assert err.count("\n") == 1
    assert "apt install libopenblas0-pthread" in err
    assert "['one', 'two words']" in out


@linux
def test_a_library_that_does_not_take_hold_is_no_loop() -> None:
    out, _ = ran(**{openblas.GUARD: "1"})
    assert out.rstrip().endswith("['one', 'two words']")


@linux
def test_children_get_it_and_keep_what_was_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openblas, "find_openblas", lambda: Path("/x/libopenblas.so.0"))
    monkeypatch.setenv("LD_PRELOAD", "/y/other.so")
    assert openblas.model_environment()["LD_PRELOAD"] == "/x/libopenblas.so.0:/y/other.so"
    monkeypatch.setattr(openblas, "find_openblas", lambda: None)
    assert "LD_PRELOAD" not in openblas.model_environment()


@linux
def test_debians_folders_are_searched(tmp_path: Path) -> None:
    library = tmp_path / "x86_64-linux-gnu" / "openblas-pthread" / "libopenblas.so.0"
    library.parent.mkdir(parents=True)
    library.touch()
    assert openblas.find_openblas([str(tmp_path)]) == library
    assert openblas.find_openblas([str(tmp_path / "nothing")]) is None
