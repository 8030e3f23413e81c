"""Store, coordinator and node daemons as processes of their own, in one folder."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from kvferry.cluster.policy import named_policy
from kvferry.cluster.policy_file import dump_policy
from kvferry.errors import FerryError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0


class Service:
    """One ``kvferry`` service process, known to be ready."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        self._ready = folder / f"{name}.ready.json"
        self._ready.unlink(missing_ok=True)
        full = [sys.executable, "-m", "kvferry", *command, "--ready-file", str(self._ready)]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(full, stdout=log, stderr=log)

    def wait_ready(self) -> dict[str, Any]:
        """What the ready file says. Raises: FerryError with the end of the log."""
        end = time.monotonic() + START_TIMEOUT_S
        while not self._ready.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise FerryError(f"{self.name} did not start: {self._log.read_text()[-600:]}")
            time.sleep(0.02)
        ready: dict[str, Any] = json.loads(self._ready.read_text())
        return ready

    def stop(self) -> None:
        """SIGTERM, then SIGKILL if that was not enough."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Cluster:
    """One store, one coordinator and ``nodes`` daemons under ``folder``.

    Args:
        folder: survives a stop: the store's blobs and the coordinator's state are there.
        nodes: how many daemons.
        fresh_nodes: empty their tiers first, as new machines would be.
        with_store: False: the daemons are told of a store that is not there.
        tiers: False: the daemons keep no blobs themselves, all come from the store.
        host: address that all of them listen on.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        fresh_nodes: bool = False,
        with_store: bool = True,
        tiers: bool = True,
        host: str = "127.0.0.1",
    ) -> None:
        self.folder, self._nodes, self._tiers = folder, nodes, tiers
        self._fresh, self._with_store, self._host = fresh_nodes, with_store, host
        self._services: list[Service] = []
        # Unix socket paths have at most 104 bytes on macOS: keep them short.
        self.sockets = [folder / f"n{i}.sock" for i in range(nodes)]
        self.policy_file = folder / "policy.toml"

    def set_policy(self, name: str) -> None:
        """Write the policy file; a running coordinator pushes it to the nodes."""
        self.policy_file.write_text(dump_policy(named_policy(name)))

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self, name: str, *command: str) -> Service:
        service = Service(name, command, self.folder)
        self._services.append(service)
        return service

    def _start(self) -> None:
        quiet = ("--listen", f"{self._host}:0", "--metrics-listen", "")
        coordinator = self._launch(
            "coordinator", "coordinator", *quiet,
            "--policy-file", str(self.policy_file),
            "--data-dir", str(self.folder / "coordinator"),
        )  # fmt: skip
        store_address = "127.0.0.1:1"  # nobody listens on port 1
        if self._with_store:
            backend = f"file://{self.folder / 'store'}"
            store = self._launch("store", "store", *quiet, "--backend", backend)
            store_address = store.wait_ready()["address"]
        coordinator_address = coordinator.wait_ready()["address"]
        started = []
        for index, socket in enumerate(self.sockets):
            data = self.folder / f"node{index}"
            if self._fresh:
                shutil.rmtree(data, ignore_errors=True)
            started.append(
                self._launch(
                    f"node{index}",
                    "node",
                    *quiet,
                    "--node-id",
                    f"machine-{index}",
                    "--socket",
                    str(socket),
                    "--data-dir",
                    str(data),
                    "--store",
                    store_address,
                    "--coordinator",
                    coordinator_address,
                    *(() if self._tiers else ("--memory-bytes", "0", "--disk-bytes", "0")),
                )
            )
        for service in started:
            service.wait_ready()

    def service(self, name: str) -> Service:
        """A running one by name: "store", "coordinator", "node0", ..."""
        return next(service for service in self._services if service.name == name)

    def stop(self) -> None:
        """All of them, nodes first: they still hand over what they have."""
        for service in reversed(self._services):
            service.stop()
        self._services.clear()
