"""Generate the stubs of kvferry/proto/v1 (``make proto``), or into another folder."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ("python", "grpc_python", "mypy", "mypy_grpc")


def generate(out: Path) -> None:
    """Run protoc over every .proto file, with ``out`` as the root of what it writes."""
    protos = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("kvferry/proto/v1/*.proto"))
    outputs = [f"--{plugin}_out={'quiet:' if 'mypy' in plugin else ''}{out}" for plugin in PLUGINS]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *outputs, *protos]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
