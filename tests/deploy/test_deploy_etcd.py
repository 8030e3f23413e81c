"""The example of etcd's settings is one that etcd takes, and says the same everywhere."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from debian_server import program

from kvferry.cli.cluster_bench.ports import free_ports

DEPLOY = Path(__file__).parents[2] / "deploy"
_ADDRESSES = (
    "127.0.0.1:2379", "192.168.1.10:2379",
    "192.168.1.10:2380", "192.168.1.11:2380", "192.168.1.12:2380",
)  # fmt: skip
pytestmark = pytest.mark.processes


def test_etcd_starts_with_the_example_on_addresses_of_this_machine(tmp_path: Path) -> None:
    text = (DEPLOY / "etcd" / "etcd.default").read_text()
    shown = dict(re.findall(r'(?m)^(ETCD_\w+)="(.*)"$', text))
    peers = dict(part.split("=", 1) for part in shown["ETCD_INITIAL_CLUSTER"].split(","))
    assert len(peers) == 3
    assert peers[shown["ETCD_NAME"]] == shown["ETCD_INITIAL_ADVERTISE_PEER_URLS"]
    assert shown["ETCD_ADVERTISE_CLIENT_URLS"] in shown["ETCD_LISTEN_CLIENT_URLS"]
    ports = free_ports(len(_ADDRESSES))
    ours = {old: f"127.0.0.1:{new}" for old, new in zip(_ADDRESSES, ports, strict=True)}
    here = {
        name: re.sub(r"[\d.]+:\d+", lambda found: ours[found[0]], value)
        for name, value in shown.items()
    }
    here["ETCD_DATA_DIR"] = str(tmp_path / "data")
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [program("etcd", "etcd-server")],
            env={"PATH": os.environ["PATH"], **here},
            stdout=file,
            stderr=file,
        )
    try:
        end = time.monotonic() + 30
        # Two members are not there, so it cannot serve; it asks them for their votes.
        while "is starting a new election" not in log.read_text():
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "unrecognized environment variable" not in log.read_text()
