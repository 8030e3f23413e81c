"""Real Redis servers from Debian's package, on free ports: one, or a cluster of three masters."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from debian_server import program

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.cluster.redis.link import RedisLink

MASTERS = 3
SLOTS = 16_384


class Redis:
    """A redis-server process, ready; it can be stopped, killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._binary = program("redis-server")
        self.port = free_port()
        self._folder = folder / f"redis-{self.port}"
        self._folder.mkdir(parents=True)
        self._options = options
        self.process: subprocess.Popen[bytes]
        self.start()

    @property
    def url(self) -> str:
        """As kvferry takes it."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """With nothing in it."""
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "no", "--dir", str(self._folder), *self._options]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(lambda: self.ask("PING"), lambda: (self._folder / "log").read_text()[-1000:])

    def ask(self, *command: object) -> Any:
        """One command, at once."""
        import redis

        with redis.Redis(port=self.port, socket_timeout=5.0) as client:
            return client.execute_command(*command)

    def setting(self, name: str) -> str:
        """What it is configured to."""
        found = self.ask("CONFIG GET", name)
        return next(v if isinstance(v, str) else v.decode() for v in found.values())

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self.process.send_signal(number)

    def stop(self) -> None:
        """At once."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)


class Cluster:
    """Three masters."""

    def __init__(self, members: list[Redis]) -> None:
        self.members = members

    @property
    def url(self) -> str:
        """As kvferry takes it."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{m.port}" for m in self.members)


@contextmanager
def one_redis(folder: Path, *options: str) -> Iterator[Redis]:
    """A server of this test's own."""
    server = Redis(folder, *options)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def redis_cluster(folder: Path) -> Iterator[Cluster]:
    """Three masters that share the slots."""
    with ExitStack() as stack:
        members = []
        for _ in range(MASTERS):
            # The bus is by default 10000 above the port, which may be no port at all.
            options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
            members.append(stack.enter_context(one_redis(folder, *options)))
        for index, member in enumerate(members):
            start, end = (SLOTS * i // MASTERS for i in (index, index + 1))
            member.ask("CLUSTER SET-CONFIG-EPOCH", index + 1)
            member.ask("CLUSTER ADDSLOTSRANGE", start, end - 1)
        for member in members[1:]:
            members[0].ask("CLUSTER MEET", "127.0.0.1", member.port, member.setting("cluster-port"))
        wait_for(lambda: all(_formed(member) for member in members), lambda: "no cluster")
        yield Cluster(members)


def _formed(member: Redis) -> bool:
    told = member.ask("CLUSTER INFO")
    return told["cluster_state"] == "ok" and int(told["cluster_known_nodes"]) == MASTERS


async def flush(url: str) -> None:
    """Empty a server, or all masters."""
    link = RedisLink(url, timeout_s=20.0)
    await link.delete([key async for key in link.scan()])
    await link.aclose()


def wait_for(what: Callable[[], object], why: Callable[[], str], seconds: float = 30.0) -> None:
    """Until ``what`` is true and raises nothing; fails with ``why``."""
    end = time.monotonic() + seconds
    while True:
        try:
            if what():
                return
        except Exception as exc:
            last: object = exc
        else:
            last = ""
        if time.monotonic() > end:
            raise AssertionError(f"{why()} {last}")
        time.sleep(0.05)
