"""Checked-in stubs are what the .proto files say."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_stubs_match_the_proto_files(tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    path = f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, str(ROOT / "scripts" / "generate_proto.py"), str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PATH": path}, check=True, capture_output=True)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*_pb2*"))
    kept = sorted(p.relative_to(ROOT) for p in (ROOT / "kvferry").rglob("*_pb2*.py*"))
    assert made == [p for p in kept if p.suffix in (".py", ".pyi")]
    stale = [str(p) for p in made if (tmp_path / p).read_text() != (ROOT / p).read_text()]
    assert not stale, f"run `make proto`: {stale}"
