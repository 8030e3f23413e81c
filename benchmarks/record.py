"""Results with what is needed to read them: machine, versions, commit, command."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from kvferry import __version__
from kvferry.codec.lab.machine import commit, machine

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, command: str, figures: Mapping[str, object]) -> Path:
    """Write ``benchmarks/results/NAME.json``; returns its path."""
    result = {
        "name": name,
        "command": command,
        "figures": dict(figures),
        "machine": machine(),
        "kvferry": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, default=str) + "\n")
    return path
