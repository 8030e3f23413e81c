"""Thirty minutes of eight nodes under load while parts of the cluster are killed at random."""

import sys

from benchmarks.record import RESULTS, write_result
from kvferry.cli.cluster_bench.soak import measure
from kvferry.cli.output import progress


def main(minutes: float = 30.0) -> None:
    """Run it and keep what it found, and a plot of memory."""
    with progress("soak", minutes * 60) as bar:
        found = measure(minutes, plot=RESULTS / "soak.png", on_second=bar.update)
    print(write_result("soak", f"python -m benchmarks.soak {minutes:g}", found))


if __name__ == "__main__":
    main(*(float(argument) for argument in sys.argv[1:2]))
