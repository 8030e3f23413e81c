"""Resident memory of a node daemon that idles: at most 120 MB, and without mlx."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.record import write_result
from kvferry.node.client import NodeClient

COMMAND = "python -m benchmarks.node_idle"
SETTLE_S = 10.0
LIMIT_MB = 120.0


def measure(folder: Path) -> dict[str, object]:
    """Start a daemon with default budgets, let it idle, look at it."""
    ready, socket = folder / "ready.json", folder / "n.sock"
    command = [sys.executable, "-m", "kvferry", "node", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "127.0.0.1:0", "--socket", str(socket)]
    command += ["--data-dir", str(folder / "data"), "--ready-file", str(ready)]
    process = subprocess.Popen(command)
    try:
        while not ready.exists():
            if process.poll() is not None:
                raise SystemExit("the node daemon did not start")
            time.sleep(0.05)
        time.sleep(SETTLE_S)
        seen = psutil.Process(process.pid)
        mapped = {Path(area.path).name for area in seen.memory_maps()}
        with NodeClient(socket) as client:
            reported = client.status().resident_bytes
        return {
            "rss_mb": round(seen.memory_info().rss / 1e6, 1),
            "reported_rss_mb": round(reported / 1e6, 1),
            "limit_mb": LIMIT_MB,
            "imports_mlx": any("mlx" in name for name in mapped),
            "idle_seconds": SETTLE_S,
            "store_and_coordinator": "not running",
        }
    finally:
        process.terminate()
        process.wait(60)


def main() -> int:
    """Measure, keep the result, say whether it holds."""
    with tempfile.TemporaryDirectory(prefix="kvf-") as folder:
        figures = measure(Path(folder))
    print(json.dumps(figures))
    print(write_result("node_idle", COMMAND, figures))
    return 0 if float(str(figures["rss_mb"])) <= LIMIT_MB and not figures["imports_mlx"] else 1


if __name__ == "__main__":
    sys.exit(main())
