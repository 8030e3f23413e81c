"""All five triggers on a running node: stored after the moment in the policy, not before."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_samples import Machines, Service, wait_for
from offering_hook import TOKENS
from tiny_llama import save_model, sharp_llama

from kvferry.cluster import policy as policies
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.policy_rules import TRIGGERS
from kvferry.cluster.sync_client import SyncBlobStoreClient

pytestmark = [pytest.mark.processes, pytest.mark.model]
NEVER = {"memory_mark": 1.0, "idle_s": 86_400}


class Hook:
    """`offering_hook.py`, running."""

    def __init__(self, socket: Path, folder: Path) -> None:
        script = Path(__file__).with_name("offering_hook.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(socket), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() is True

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, line: str) -> Any:
        """The answer to one command."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Wait for its end."""
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


class Scene:
    """Store, coordinator, node and hook, and the policies that they follow."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        model, config = sharp_llama(27)
        save_model(model, config, folder)
        self.store, self.coordinator = machines.store(), machines.coordinator()
        self.node: Service = machines.node(
            store=self.store.address, coordinator=self.coordinator.address
        )
        self.hook = Hook(machines.socket(), folder)
        self.direct = SyncBlobStoreClient(self.store.address)
        self._changes = 0

    def follow(self, when: str, **more: float) -> None:
        """Put a policy in force that stores at one moment only, and wait for the hook."""
        self._changes += 1
        policy = policies.named_policy("exact")
        policy.name = f"{when} {self._changes}"
        del policy.when[:]
        policy.when.append(TRIGGERS[when])
        for name, value in {**NEVER, **more}.items():
            setattr(policy, name, value)

        async def put() -> None:
            async with CoordinatorClient(self.coordinator.address) as client:
                await client.set_policy(policy)

        asyncio.run(put())
        wait_for(lambda: self.hook.ask("policy") == policy.name)

    def stored(self) -> int:
        """Blobs in the store."""
        return self.direct.stat().blobs

    def settled(self) -> int:
        """Blobs in the store once all that was to go there is there."""
        assert self.hook.ask("flush")
        return self.stored()

    def close(self) -> None:
        self.direct.close()
        self.hook.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Machines(tmp_path_factory.mktemp("t")) as machines:
        made = Scene(machines, tmp_path_factory.mktemp("model"))
        yield made
        made.close()


def _pressure(scene: Scene) -> None:
    scene.follow("memory_pressure", memory_mark=0.001)


def _idle(scene: Scene) -> None:
    scene.follow("idle", idle_s=1)


def _sleep(scene: Scene) -> None:
    scene.node.send(signal.SIGUSR1)


@pytest.mark.parametrize(
    ("when", "moment"),
    [("memory_pressure", _pressure), ("idle", _idle), ("before_sleep", _sleep)],
)
def test_what_is_offered_waits_for_its_moment(
    scene: Scene, when: str, moment: Callable[[Scene], None]
) -> None:
    scene.follow(when)
    seed = 10 + list(TRIGGERS).index(when)
    before = scene.settled()
    for event in ("prefill", "turn_end"):
        assert scene.hook.ask(f"{event} {seed}")  # taken, for later
    assert scene.settled() == before
    assert scene.hook.ask(f"restore {seed}") == 0
    moment(scene)
    wait_for(lambda: scene.stored() > before)
    wait_for(lambda: scene.hook.ask(f"restore {seed}") == TOKENS - 1)


@pytest.mark.parametrize(
    ("when", "its", "other"),
    [("after_prefill", "prefill", "turn_end"), ("turn_end", "turn_end", "prefill")],
)
def test_what_is_offered_at_its_moment_is_stored_and_at_another_not(
    scene: Scene, when: str, its: str, other: str
) -> None:
    scene.follow(when)
    seed = 20 + list(TRIGGERS).index(when)
    before = scene.settled()
    assert not scene.hook.ask(f"{other} {seed}")
    assert scene.settled() == before
    assert scene.hook.ask(f"{its} {seed}")
    assert scene.settled() > before
    assert scene.hook.ask(f"restore {seed}") == TOKENS - 1
