"""Real etcd members on this machine, to be killed, stopped and started again."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

import grpc

from kvferry.cli.cluster_bench.ports import free_ports
from kvferry.errors import ConfigError, StoreUnavailableError
from kvferry.proto.v1 import etcd_pb2 as pb

START_S = 60.0
ASK_S = 2.0


def etcd_program() -> str:
    """The path of etcd. Raises: ConfigError with the package that has it."""
    found = shutil.which("etcd")
    if found is None:
        raise ConfigError("etcd", "not found", "installed (sudo apt install etcd-server)")
    return found


class EtcdMember:
    """One etcd process over a folder of its own."""

    def __init__(self, program: str, name: str, folder: Path, ports: tuple[int, int]) -> None:
        self._program, self._name = program, name
        self.data, self._log = folder / name, folder / f"{name}.log"
        self._token = folder.name
        self.address, self.peer = (f"127.0.0.1:{port}" for port in ports)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, initial_cluster: str) -> None:
        """Start, or start again over the same data."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    self._program,
                    "--name", self._name, "--data-dir", str(self.data),
                    "--listen-client-urls", f"http://{self.address}",
                    "--advertise-client-urls", f"http://{self.address}",
                    "--listen-peer-urls", f"http://{self.peer}",
                    "--initial-advertise-peer-urls", f"http://{self.peer}",
                    "--initial-cluster", initial_cluster,
                    "--initial-cluster-token", self._token,
                ],
                stdout=log,
                stderr=log,
            )  # fmt: skip

    @property
    def runs(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send one; after a SIGKILL its end is waited for."""
        if self.process is None:
            return
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(START_S)

    def status(self) -> pb.StatusResponse | None:
        """What it says of itself; None: nothing."""
        with grpc.insecure_channel(self.address) as channel:
            call = channel.unary_unary(
                "/etcdserverpb.Maintenance/Status",
                request_serializer=pb.StatusRequest.SerializeToString,
                response_deserializer=pb.StatusResponse.FromString,
            )
            try:
                return call(pb.StatusRequest(), timeout=ASK_S, wait_for_ready=True)
            except grpc.RpcError:
                return None


class EtcdMembers:
    """Three members that know each other; entered, all run and have a leader. Blocks."""

    def __init__(self, program: str, folder: Path, size: int = 3) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        ports = free_ports(2 * size)
        self.members = [
            EtcdMember(program, f"m{i}", folder, pair)
            for i, pair in enumerate(zip(ports[:size], ports[size:], strict=True))
        ]
        self._initial = ",".join(f"m{i}=http://{m.peer}" for i, m in enumerate(self.members))

    @property
    def endpoints(self) -> str:
        """As the setting ``etcd`` wants them."""
        return ",".join(f"http://{m.address}" for m in self.members)

    def heal(self) -> None:
        """Have every member run, and wait until all have a leader.

        Raises: StoreUnavailableError where that takes more than `START_S`.
        """
        for member in self.members:
            if member.runs:
                member.signal(signal.SIGCONT)
            else:
                member.start(self._initial)
        end = time.monotonic() + START_S
        while not all(s is not None and s.leader for s in [m.status() for m in self.members]):
            if time.monotonic() > end:
                raise StoreUnavailableError(f"etcd at {self.endpoints}", "it did not come up")
            time.sleep(0.05)

    def forget(self) -> None:
        """End all members and delete what they hold: `heal` starts them as a new cluster."""
        self.signal(signal.SIGKILL)
        for member in self.members:
            shutil.rmtree(member.data, ignore_errors=True)

    def leader(self) -> EtcdMember:
        """The member that leads. Raises: StoreUnavailableError: none does."""
        for member in self.members:
            status = member.status()
            if status is not None and status.leader == status.header.member_id:
                return member
        raise StoreUnavailableError(f"etcd at {self.endpoints}", "no member leads")

    def signal(self, number: int) -> None:
        """To all that run."""
        for member in self.members:
            if member.runs:
                member.signal(number)

    def __enter__(self) -> Self:
        try:
            self.heal()
        except BaseException:
            self.signal(signal.SIGKILL)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
