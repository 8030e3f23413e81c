"""Two coordinators over etcd and a node that follows them, as processes on this machine."""

import signal
from pathlib import Path
from typing import Self

from kvferry.cli.cluster_bench.ports import free_ports
from kvferry.cli.demo.cluster import Service
from kvferry.node.client import NodeClient


class Coordinators:
    """They keep their addresses over a restart; entered, all are ready. Blocks.

    Args:
        folder: of their data and logs.
        etcd: endpoints.
        flags: further ones for every coordinator.
    """

    def __init__(self, folder: Path, etcd: str, *flags: str, count: int = 2) -> None:
        self.folder = folder
        self._command = ("--etcd", etcd, "--metrics-listen", "", *flags)
        self.all = [f"127.0.0.1:{port}" for port in free_ports(count)]
        self.running: dict[str, Service] = {}
        self._node: Service | None = None
        self.socket = folder / "n.sock"

    @property
    def addresses(self) -> str:
        """As nodes and commands want them."""
        return ",".join(self.all)

    def start(self, address: str) -> None:
        """One of them, anew or again; waits until it serves."""
        name = f"coordinator{self.all.index(address)}"
        data = str(self.folder / name)
        command = ("coordinator", "--listen", address, "--data-dir", data, *self._command)
        self.running[address] = Service(name, command, self.folder)
        self.running[address].wait_ready()

    def start_node(self, *flags: str) -> NodeClient:
        """A node without a store, and a client of it."""
        self._node = Service(
            "node",
            (
                "node", "--node-id", "n", "--listen", "127.0.0.1:0", "--metrics-listen", "",
                "--socket", str(self.socket), "--data-dir", str(self.folder / "node"),
                "--store", "", "--coordinator", self.addresses, *flags,
            ),
            self.folder,
        )  # fmt: skip
        self._node.wait_ready()
        return NodeClient(self.socket, timeout_s=10.0)

    def signal(self, address: str, number: int) -> None:
        """Send one; after a SIGKILL its end is waited for."""
        process = self.running[address].process
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait()

    def __enter__(self) -> Self:
        try:
            for address in self.all:
                self.start(address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        services = [*self.running.values(), *([self._node] if self._node else [])]
        for service in services:
            if service.process.poll() is None:
                service.process.kill()
                service.process.wait()
