"""The cluster's figures: policy, transfers, lookups, failover, several stores and peers."""

import json
import subprocess
import sys

from benchmarks.record import write_result

COMMAND = "kvferry bench cluster --json -"


def main() -> None:
    """Run it and keep what it prints; fails where a figure is missed."""
    done = subprocess.run([sys.executable, "-m", *COMMAND.split()], stdout=subprocess.PIPE)
    print(write_result("cluster", COMMAND, json.loads(done.stdout)))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
