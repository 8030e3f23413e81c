"""Bytes against fidelity on texts that the calibration has not seen: GPL-3 and Python code."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.record import write_result

TEXTS = (Path("/usr/share/common-licenses/GPL-3"), Path(statistics.__file__))
TARGETS = ("0.005", "0.01")
COMMAND = "kvferry eval --model smollm2 --text TEXT --codec ferry --opt target_kl=T --json -"


def main() -> None:
    """Run ``kvferry eval`` for each text and target."""
    points = {}
    for text in TEXTS:
        if not text.is_file():
            continue
        for target in TARGETS:
            command = COMMAND.replace("TEXT", str(text)).replace("=T ", f"={target} ").split()
            done = subprocess.run(
                [sys.executable, "-m", *command], stdout=subprocess.PIPE, check=True
            )
            points[f"{text.name} target_kl={target}"] = json.loads(done.stdout)
            print(text.name, target, points[f"{text.name} target_kl={target}"]["kl_mean"])
    print(write_result("fidelity", COMMAND, points))


if __name__ == "__main__":
    main()
