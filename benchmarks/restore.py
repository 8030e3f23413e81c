"""Restores from a store over loopback against prefill (design 12), and what goes with them:
links that are too slow, and offers that are encoded while the model generates.

SmolLM2 with its calibration from the user's cache folder, which is made if it is missing.
"""

import json
import subprocess
import sys

from benchmarks.record import RESULTS, write_result

COMMAND = "kvferry bench restore --rounds 5 --sweep-rounds 7 --out restore.png --json -"


def main() -> None:
    """Run it and keep what it prints and draws."""
    RESULTS.mkdir(exist_ok=True)
    command = COMMAND.replace("restore.png", str(RESULTS / "restore.png")).split()
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, check=True)
    print(write_result("restore", COMMAND, json.loads(done.stdout)).read_text())


if __name__ == "__main__":
    main()
