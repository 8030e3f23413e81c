"""``kvferry status``: plain about what is down, whole about what is up."""

import json
import signal
import subprocess
import sys
from typing import Any

import pytest
from node_samples import Machines, blob, wait_for

from kvferry.proto.v1 import node_pb2

pytestmark = pytest.mark.processes


def run(*options: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "kvferry", "status", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_all_up_then_some_then_none(machines: Machines) -> None:
    store, coordinator = machines.store(), machines.coordinator()
    node = machines.node(store=store.address, coordinator=coordinator.address)
    where = ["--socket", str(machines.socket()), "--store", store.address]
    where += ["--coordinator", coordinator.address]
    client = machines.client()
    client.put(*blob("one"))
    assert client.flush(20.0)
    wait_for(lambda: client.status().coordinator_reachable)
    code, out, err = run(*where, "--json", "-")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    assert [found[name]["up"] for name in ("node", "store", "coordinator")] == [True] * 3
    assert found["node"]["store_reachable"] is True
    assert found["node"]["counters"]["uploads_done"] == 1
    assert [tier["blobs"] for tier in found["node"]["tiers"]] == [1, 1]
    assert found["store"]["blobs"] == 1
    assert [m["node_id"] for m in found["coordinator"]["members"]] == ["n0"]
    code, out, _ = run(*where)
    assert code == 0
    assert "down" not in out
    assert "n0: ready" in out
    store.end()
    node.end()
    code, out, _ = run(*where)
    assert code == 0
    assert out.count("down: ") == 2
    assert "Traceback" not in out
    coordinator.end()
    code, out, _ = run(*where, "--json", "-")
    assert code == 1
    assert not any(answer["up"] for answer in json.loads(out).values())


def test_what_was_written_to_disk_is_shown_and_outlives_a_kill(machines: Machines) -> None:
    limits = ("--disk-writes-per-day-bytes", "150000", "--disk-endurance-bytes", "36525000000")
    node = machines.node(*limits)
    key, data = blob("kept", size=100_000)
    machines.client().put(key, data)
    node.end(signal.SIGKILL)
    again = machines.node(*limits)
    over, more = blob("over the budget", size=100_000)
    machines.client().put(over, more)
    code, out, _ = run("--socket", str(machines.socket()), "--json", "-")
    assert code == 0
    writes = json.loads(out)["node"]["disk_writes"]
    # A kill may cost the day, and never gives it twice.
    assert len(data) <= writes["today"]
    assert writes["budget_per_day"] == 150_000
    assert 0 < writes["lifetime_years"] < 1000
    assert again.metrics()["kvferry_node_disk_writes_budget_bytes"] == 150_000
    tiers = {tier["name"]: tier["blobs"] for tier in json.loads(out)["node"]["tiers"]}
    assert tiers["disk"] == 1
    assert machines.client().get(over) == more
    code, out, _ = run("--socket", str(machines.socket()))
    assert code == 0
    assert "written to disk today" in " ".join(out.split())


def test_only_what_comes_back_is_wanted_where_the_node_is_told_so(machines: Machines) -> None:
    node = machines.node("--store-on-second-use")
    keys = [blob(name)[0] for name in "abc"]
    assert set(machines.client().admit(keys)) == {node_pb2.ADMISSION_DECLINED}
    assert node.end() == 0
    machines.node("--store-on-second-use")
    other = blob("d")[0]
    assert list(machines.client().admit([*keys, other])) == [
        *[node_pb2.ADMISSION_WANTED] * 3,
        node_pb2.ADMISSION_DECLINED,
    ]
