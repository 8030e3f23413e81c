"""Real S3 servers for tests: moto's, quick; and Ceph's gateway over its own small cluster."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from debian_server import program
from store_samples import MIB, Clock

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.store import BucketLimits, BucketStore
from kvferry.cluster.bucket.url import parse_bucket_url

BUCKET = "kvferry-tests"
KEYS = {"AWS_ACCESS_KEY_ID": "kvferrytest", "AWS_SECRET_ACCESS_KEY": "kvferry-test-secret"}


@dataclass(frozen=True)
class S3Server:
    """An S3 at HOST:PORT of this machine, with one bucket."""

    port: int

    def url(self, prefix: str = "", port: int = 0, **options: str) -> str:
        """A backend URL under a prefix of its own. ``port``: that of a proxy before it."""
        more = "".join(f"&{name}={value}" for name, value in options.items())
        prefix = prefix or uuid.uuid4().hex
        return f"s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{port or self.port}{more}"


@contextmanager
def _environment() -> Iterator[None]:
    wanted = KEYS | {"AWS_REGION": "us-east-1"}
    kept = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_bucket(port: int) -> None:
    """Create `BUCKET`."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()


def _wait_for(port: int, process: "subprocess.Popen[Any]", seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, be it that a key is missing
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"no S3 at port {port}: {log.read_text()[-2000:]}")


@contextmanager
def _running(command: list[str], log: Path, **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, **options)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto's server in a process of its own."""
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, log) as process, _environment():
        _wait_for(port, process, 60, log)
        make_bucket(port)
        yield S3Server(port)


class _Ceph:
    """One monitor, one manager, three OSDs in memory and a gateway, without passwords."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.conf = root / "ceph.conf"
        self.fsid = str(uuid.uuid4())
        monitor = free_port()
        self.monitor = f"v1:127.0.0.1:{monitor}"
        self.conf.write_text(
            f"""[global]
fsid = {self.fsid}
mon host = [{self.monitor}]
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 2147483648
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 1
ms bind ipv6 = false
ms bind msgr2 = false
public addr = 127.0.0.1
run dir = {root}
log file = {root}/$name.log
admin socket = {root}/$name.asok
pid file =
keyring = {root}/keyring
[mon]
mon data = {root}/mon
mon initial members = a
[mgr]
mgr data = {root}/mgr
mgr module path = /usr/share/ceph/mgr
[osd]
osd data = {root}/osd.$id
osd class load list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{self.port} tcp_nodelay=1
rgw data = {root}/rgw
rgw dns name = 127.0.0.1
rgw run sync thread = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw enable quota threads = false
"""
        )

    def tool(self, *command: str, timeout: float = 120) -> str:
        """Run one of Ceph's programs to its end."""
        done = subprocess.run(
            [*command, "-c", str(self.conf)], capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        return done.stdout


@contextmanager
def ceph_cluster(root: Path) -> Iterator[S3Server]:
    """Start everything, oldest first; stop it in the other order."""
    for name in ("ceph-mon", "ceph-mgr", "ceph-osd", "radosgw"):
        program(name, "ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "ceph-common")
    ceph = _Ceph(root)
    for folder in ("mon", "mgr", "rgw", *(f"osd.{i}" for i in range(3))):
        (root / folder).mkdir()
    ceph.tool("ceph-authtool", "--create-keyring", str(root / "keyring"), "--gen-key", "-n", "mon.")
    ceph.tool(
        "monmaptool", "--create", "--addv", "a", f"[{ceph.monitor}]", "--fsid", ceph.fsid,
        str(root / "monmap"),
    )  # fmt: skip
    ceph.tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(root / "monmap"))
    conf = ["-c", str(ceph.conf), "-f"]
    with contextmanager(_daemons)() as start:
        start(["ceph-mon", "-i", "a", *conf], root / "mon.out")
        start(["ceph-mgr", "-i", "x", *conf], root / "mgr.out")
        for i in range(3):
            ident = str(uuid.uuid4())
            ceph.tool("ceph", "osd", "new", ident, str(i))
            ceph.tool("ceph-osd", "-i", str(i), "--mkfs", "--osd-uuid", ident)
            start(["ceph-osd", "-i", str(i), *conf], root / f"osd{i}.out")
        gateway = start(["radosgw", "-n", "client.rgw", *conf], root / "rgw.out")
        _wait_for(ceph.port, gateway, 180, root / "rgw.out")
        key, secret = KEYS.values()
        ceph.tool(
            "radosgw-admin", "user", "create", "--uid", "kvferry", "--display-name", "kvferry",
            "--access-key", key, "--secret-key", secret,
        )  # fmt: skip
        make_bucket(ceph.port)
        yield S3Server(ceph.port)


def _daemons() -> Iterator[Any]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda command, log: stack.enter_context(_running(command, log))


@pytest.fixture(scope="session")
def ceph() -> Iterator[S3Server]:
    """Ceph in a folder with a short name, as its sockets need."""
    root = Path(tempfile.mkdtemp(prefix="kvc", dir="/tmp"))
    try:
        with _environment(), ceph_cluster(root) as server:
            yield server
    finally:
        shutil.rmtree(root, ignore_errors=True)


@asynccontextmanager
async def bucket_store(
    bucket: Bucket | str, *, clock: Clock | None = None, **limits: Any
) -> AsyncIterator[BucketStore]:
    """A store over a bucket or a backend URL; budget 64 MiB unless told."""
    bounds = BucketLimits(**{"budget_bytes": 64 * MIB, **limits})
    opened = Bucket.open(parse_bucket_url(bucket)) if isinstance(bucket, str) else bucket
    more = {"clock": clock} if clock is not None else {}
    async with await BucketStore.open(opened, bounds, **more) as store:
        yield store


def memory_bucket() -> Bucket:
    """obstore's own bucket in memory: the same calls without a server."""
    from obstore.store import MemoryStore

    return Bucket(MemoryStore(), "memory bucket", prefix="some/where")
