"""``kvferry store`` as a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Process:
    """A running store."""

    def __init__(self, root: Path, *options: str) -> None:
        self.ready_file = root.parent / "ready.json"
        self.ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "kvferry", "store", "--listen", "127.0.0.1:0"]
        command += ["--metrics-listen", "127.0.0.1:0", "--backend", f"file://{root}"]
        command += ["--ready-file", str(self.ready_file), "--reserve-bytes", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        end = time.monotonic() + 60
        while not self.ready_file.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(self.process.communicate()[1])
            time.sleep(0.02)
        self.ready: dict[str, Any] = json.loads(self.ready_file.read_text())
        self.address: str = self.ready["address"]

    def end(self, number: int) -> tuple[int, str, str]:
        """Signal it and wait: (exit code, output, errors)."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextmanager
def running(root: Path, *options: str) -> Iterator[Process]:
    started = Process(root, *options)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()
