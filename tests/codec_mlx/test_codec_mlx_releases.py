"""The cache adapters with another release of mlx-lm than the one installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OTHER = "0.31.3"  # exo's fork is based on it
HERE = Path(__file__).parent


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with only that release; what it needs is what the installed one needs."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(tmp_path), f"mlx-lm=={OTHER}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mlx-lm {OTHER} cannot be had: {done.stderr.strip()[-200:]}")
    return tmp_path


@pytest.mark.long
def test_every_kind_of_cache_of_an_older_release_goes_on_alike(other: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(other), str(HERE.parent)])}
    asked = "import mlx_lm; print(mlx_lm.__version__)"
    version = subprocess.run(
        [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True
    )
    assert version.stdout.strip() == OTHER
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "test_codec_mlx_models.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
