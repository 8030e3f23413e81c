"""What agreement adds to a request: the collectives of a restore, at most 5 ms."""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.record import write_result
from kvferry.node.hooks.pipeline.launch import Ranks

COMMAND = "python -m benchmarks.agreement"
ROUNDS = 300
COLLECTIVES = 2  # of a hit; a miss takes one
LIMIT_MS = 5.0
SPLITS = {2: [(0, 15), (15, 30)], 3: [(0, 10), (10, 20), (20, 30)]}


def measure(folder: Path) -> dict[str, object]:
    """Ranks that arrive together; the slowest one's time counts."""
    figures: dict[str, object] = {"collectives": COLLECTIVES, "limit_ms": LIMIT_MS}
    for count, split in SPLITS.items():
        configs = [{"model": "smollm2", "layers": layers} for layers in split]
        with Ranks(configs, folder) as ranks:
            ranks.call("agree", rounds=20)
            answers = ranks.call("agree", rounds=ROUNDS, collectives=COLLECTIVES)
        slowest = sorted(max(each) for each in zip(*(a["seconds"] for a in answers), strict=True))
        figures[f"ranks_{count}_median_ms"] = round(1e3 * statistics.median(slowest), 3)
        figures[f"ranks_{count}_p99_ms"] = round(1e3 * slowest[int(0.99 * ROUNDS)], 3)
    return figures


def main() -> int:
    """Measure, keep the result, say whether it holds."""
    with tempfile.TemporaryDirectory(prefix="kvf-") as folder:
        figures = measure(Path(folder))
    print(json.dumps(figures))
    print(write_result("agreement", COMMAND, figures))
    return 0 if float(str(figures["ranks_3_median_ms"])) <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
