"""The demo's figures, from a run of ``kvferry demo`` with an existing calibration."""

import json
import subprocess
import sys
import time

from benchmarks.record import write_result

COMMAND = "kvferry demo --json -"


def main() -> None:
    """Run it and keep what it prints."""
    command = [sys.executable, "-m", "kvferry", "demo", "--json", "-"]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)
    figures["whole_run_seconds"] = time.monotonic() - started
    print(write_result("demo", COMMAND, figures))


if __name__ == "__main__":
    main()
