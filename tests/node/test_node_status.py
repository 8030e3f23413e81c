"""``kvferry status``: plain about what is down, whole about what is up."""

import json
import subprocess
import sys
from typing import Any

import pytest
from node_samples import Machines, blob, wait_for

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
