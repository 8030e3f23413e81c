"""Imports point down, and the linter that says so can say no."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_keep_to_the_contracts() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("proto/keys.py", "import kvferry.codec.base"),
        ("codec/base.py", "import kvferry.cluster.repository"),
        ("codec/entropy.py", "import mlx.core"),
        ("codec/registry.py", "import kvferry.codec.mlx.load"),
        ("codec/blob.py", "import grpc"),
        ("cluster/repository.py", "import mlx.core"),
    ],
)
def test_a_violation_is_caught(tmp_path: Path, module: str, line: str) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kvferry", tmp_path / "kvferry", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "kvferry" / module
    file.write_text(file.read_text() + f"\n{line}  # noqa\n")
    done = lint(tmp_path)
    assert done.returncode != 0, done.stdout
    assert "BROKEN" in done.stdout
