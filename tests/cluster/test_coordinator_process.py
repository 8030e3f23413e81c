"""``kvferry coordinator`` as a process: started, killed, started again; and ``policy``."""

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.cluster import policy as policies
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.errors import StoreUnavailableError
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = pytest.mark.processes


class Process:
    """A coordinator over one data folder, on a free port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy_file = folder / "policy.toml"
        self.policy_file.write_text(policies.dump_policy(policies.default_policy()))
        self.running: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> dict[str, Any]:
        """What the ready file says."""
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.running = subprocess.Popen(
                [
                    sys.executable, "-m", "kvferry", "coordinator",
                    "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
                    "--data-dir", str(self.folder / "data"),
                    "--policy-file", str(self.policy_file), "--ready-file", str(ready), *flags,
                ],
                stdout=log,
                stderr=log,
            )  # fmt: skip
        end = time.monotonic() + 30
        while not ready.exists():
            assert self.running.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)
        return dict(json.loads(ready.read_text()))

    def log(self) -> str:
        """All it said so far."""
        return (self.folder / "log").read_text()

    def end(self, number: int) -> int:
        """Send a signal and wait; the exit status."""
        assert self.running is not None
        self.running.send_signal(number)
        return self.running.wait(20)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path)
    yield made
    if made.running is not None and made.running.poll() is None:
        made.running.kill()
        made.running.wait()


def _kvferry(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvferry", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


async def test_killed_and_restarted_it_keeps_salt_and_goes_on_counting(process: Process) -> None:
    async with CoordinatorClient(process.start()["address"]) as client:
        joined = await client.register(pb.RegisterRequest(node_id="a", incarnation=1))
        watch = client.watch_policy("a")
        assert (await anext(watch)).version == 1
        started = time.monotonic()
        process.policy_file.write_text(policies.dump_policy(policies.named_policy("exact")))
        pushed = await anext(watch)
        assert (pushed.name, pushed.version) == ("exact", 2)
        assert time.monotonic() - started < 10
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(StoreUnavailableError):
            await anext(watch)
    async with CoordinatorClient(process.start()["address"]) as client:
        again = await anext(client.watch_policy("a"))
        assert (again.name, again.version) == ("exact", 2)
        beat = pb.HeartbeatRequest(node_id="a", incarnation=1, policy_version=2)
        assert not (await client.heartbeat(beat)).known
        rejoined = await client.register(pb.RegisterRequest(node_id="a", incarnation=1))
        assert rejoined.namespace_salt == joined.namespace_salt
        assert await client.set_policy(policies.default_policy()) == 3


async def test_away_follows_the_setting(process: Process) -> None:
    ready = process.start("--away-after-s", "0.5")
    async with CoordinatorClient(ready["address"]) as client:
        await client.register(pb.RegisterRequest(node_id="a", incarnation=1))
        states = set()
        async with asyncio.timeout(20):
            while "away" not in states:
                states.add((await client.members()).members[0].state)
                await asyncio.sleep(0.05)
        await client.heartbeat(pb.HeartbeatRequest(node_id="a", incarnation=1))
        states.add((await client.members()).members[0].state)
    assert states == {"joining", "away", "ready"}


def test_it_ends_cleanly_while_watched_and_serves_metrics(process: Process) -> None:
    ready = process.start()
    with urllib.request.urlopen(f"http://{ready['metrics']}/metrics", timeout=10) as reply:
        assert b"kvferry_coordinator_policy_version 1.0" in reply.read()

    async def watched() -> None:
        async with CoordinatorClient(ready["address"]) as client:
            watch = client.watch_policy("a")
            await anext(watch)
            assert await asyncio.to_thread(process.end, signal.SIGTERM) == 0
            with pytest.raises(StoreUnavailableError):
                await anext(watch)

    asyncio.run(watched())
    assert "Traceback" not in process.log()


def test_bad_settings_are_one_line_and_exit_2(tmp_path: Path) -> None:
    cases = (
        (["--listen", "0.0.0.0:0"], "loopback"),
        (["--listen", "nowhere"], "HOST:PORT"),
        (["--policy-file", str(tmp_path / "none.toml")], "No such file"),
        (["--away-after-s", "-1"], "away_after_s"),
        (["--log-level", "loud"], "debug, info"),
    )
    for place, (flags, part) in enumerate(cases):
        data = tmp_path / f"d{place}"  # a fresh one: a policy kept would stand in for a bad file
        done = _kvferry("coordinator", "--data-dir", str(data), *flags)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2, done.stderr
        assert len([line for line in lines if line.startswith("kvferry:")]) == 1
        assert part in lines[-1]
        assert "Traceback" not in done.stderr


def test_policy_commands_show_set_and_explain(process: Process) -> None:
    address = ("--coordinator", process.start()["address"])
    shown = _kvferry("policy", "show", *address)
    assert shown.returncode == 0
    assert "version 1, from: file" in shown.stdout
    assert policies.parse_policy(shown.stdout.encode()) == policies.default_policy()
    assert "version 2" in _kvferry("policy", "set", "exact", *address).stdout
    own = process.folder / "own.toml"
    own.write_text('[[rules]]\nlayers = "0-2"\ncodec = "affine"\noptions = { bits = 4 }\n')
    done = _kvferry("policy", "set", str(own), *address, "--json", "-")
    assert json.loads(done.stdout) == {"name": "own", "version": 3, "warnings": []}
    told = _kvferry("policy", "explain", *address, "--layers", "4", "--json", "-")
    answer = json.loads(told.stdout)
    assert answer["policy"]["version"] == 3
    assert [row["codec"] for row in answer["layers"]] == ["affine", "affine", "zstd", "zstd"]
    table = _kvferry("policy", "explain", *address, "--layers", "4").stdout
    assert "0 to 1" in table
    assert "2 to 3" in table
    found = json.loads(_kvferry("policy", "show", *address, "--json", "-").stdout)
    assert (found["source"], found["rules"][0]["layers"]) == ("admin", "0-2")
    own.write_text(
        '[[rules]]\ncodec = "streaming"\noptions = { ratio = 4, positions = "original" }\n'
    )
    done = _kvferry("policy", "set", str(own), *address)
    assert "version 4" in done.stdout
    assert "never put back into a live cache" in done.stderr


def test_what_a_policy_file_costs_is_told_at_the_start_and_when_it_changes(
    process: Process,
) -> None:
    def told(what: str) -> None:
        end = time.monotonic() + 20
        while what not in process.log():
            assert time.monotonic() < end, process.log()
            time.sleep(0.05)

    process.policy_file.write_text('[[rules]]\ncodec = "lowrank"\noptions = { target = "kv" }\n')
    process.start()
    told("policy file: lowrank target=kv: what keys lose")
    process.policy_file.write_text('[[rules]]\ncodec = "streaming"\n')
    told("policy file: streaming drops tokens")
    assert process.log().count("policy file: ") == 2


def test_policy_commands_fail_in_one_line(process: Process) -> None:
    address = ("--coordinator", process.start()["address"])
    bad = process.folder / "bad.toml"
    bad.write_text("[[rules]]\ncodec = 'gzip'\n")
    for arguments, status, part in (
        (("set", "exacti", *address), 2, "one of exact, default"),
        (("set", str(bad), *address), 2, "rules[0].codec"),
        (("set", str(process.folder / "none.toml"), *address), 2, "No such file"),
        (("explain", "--model", "xyz", *address), 2, "hex"),
        (("show", "--coordinator", "127.0.0.1:1"), 1, "cannot be reached"),
    ):
        done = _kvferry("policy", *arguments)
        assert done.returncode == status, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert part in done.stderr
