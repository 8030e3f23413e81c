"""Put and get of 16 MiB blobs over loopback, as a share of a raw blocking socket; plain, TLS."""

import json
import subprocess
import sys

from benchmarks.record import write_result

COMMAND = "kvferry bench transport --rounds 41 --tls --json -"


def main() -> None:
    """Run it and keep what it prints."""
    command = [sys.executable, "-m", *COMMAND.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    print(write_result("transport", COMMAND, json.loads(done.stdout)))


if __name__ == "__main__":
    main()
