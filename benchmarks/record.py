"""Results with what is needed to read them: machine, versions, commit, command."""

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from kvferry import __version__
from kvferry.codec.lab.machine import machine

RESULTS = Path(__file__).parent / "results"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write_result(name: str, command: str, figures: Mapping[str, object]) -> Path:
    """Write ``benchmarks/results/NAME.json``; returns its path."""
    result = {
        "name": name,
        "command": command,
        "figures": dict(figures),
        "machine": machine(),
        "kvferry": __version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, default=str) + "\n")
    return path
