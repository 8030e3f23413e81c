"""etcd that asks for a user, and etcd over TLS."""

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from debian_server import program
from etcd_servers import EtcdCluster

from kvferry.cli.cluster_bench.ports import free_ports
from kvferry.cluster.etcd import operations as ops
from kvferry.cluster.etcd.access import EtcdAccess, parse_endpoints
from kvferry.cluster.etcd.client import EtcdClient
from kvferry.errors import ConfigError, FerryError, ProtocolError, StoreUnavailableError
from kvferry.settings import CoordinatorSettings

pytestmark = pytest.mark.processes


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[EtcdCluster]:
    """One member with authentication, and a user who may use what is below /kvferry."""
    with EtcdCluster(program("etcd", "etcd-server"), tmp_path / "etcd", size=1) as cluster:
        for arguments in (
            "user add root:rootpw",
            "role add cluster",
            "role grant-permission cluster --prefix=true readwrite /kvferry/",
            "user add kvferry:secret",
            "user grant-role kvferry cluster",
            "user grant-role root root",
            "auth enable",
        ):
            subprocess.run(
                [
                    program("etcdctl", "etcd-client"),
                    "--endpoints",
                    cluster.endpoints,
                    *arguments.split(),
                ],
                env={"ETCDCTL_API": "3"},
                check=True,
                capture_output=True,
                timeout=30,
            )
        yield cluster


async def test_a_user_may_do_what_its_role_allows(guarded: EtcdCluster, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("secret\n")
    settings = CoordinatorSettings(
        etcd=guarded.endpoints, etcd_user="kvferry", etcd_password_file=password
    )
    access = EtcdAccess.of(settings)
    assert "secret" not in repr(access)
    async with EtcdClient(access, timeout_s=20.0) as etcd:
        await etcd.transact([], [ops.put(b"/kvferry/a", b"1")])
        found = (await etcd.get(b"/kvferry/a")).item
        assert found is not None
        watch = etcd.watch(b"/kvferry/a", found.modified)
        waiting = asyncio.ensure_future(anext(watch))
        lease, _ = await etcd.grant(5)
        await etcd.transact([], [ops.put(b"/kvferry/a", b"2", lease)])
        assert (await asyncio.wait_for(waiting, 20))[0].item.value == b"2"
        assert await etcd.keep_alive(lease) > 0
        with pytest.raises(FerryError, match="permission denied"):
            await etcd.get(b"/other")
        # Its tokens are forgotten when it starts again.
        guarded.signal(signal.SIGKILL)
        await asyncio.to_thread(guarded.heal)
        assert (await etcd.get(b"/kvferry/none")).item is None
    for wrong in (replace(access, user=""), replace(access, password="no")):  # noqa: S106
        async with EtcdClient(wrong, timeout_s=5.0) as etcd:
            with pytest.raises((ProtocolError, StoreUnavailableError)):
                await etcd.get(b"/kvferry/a")


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    """The endpoint of a member over TLS, a certificate that it takes, and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-subj", "/CN=etcd", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", str(key), "-out", str(cert),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    first, second = free_ports(2)
    url, peer = f"https://127.0.0.1:{first}", f"http://127.0.0.1:{second}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program("etcd", "etcd-server"), "--data-dir", str(tmp_path / "data"),
                "--listen-client-urls", url, "--advertise-client-urls", url,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", f"default={peer}",
                "--cert-file", str(cert), "--key-file", str(key),
                "--trusted-ca-file", str(cert), "--client-cert-auth",
            ],
            stdout=log,
            stderr=log,
        )  # fmt: skip
    yield url, cert, key
    process.kill()
    process.wait()


async def test_it_is_reached_over_tls_with_a_certificate_of_our_own(
    secured: tuple[str, Path, Path],
) -> None:
    url, cert, key = secured
    settings = CoordinatorSettings(
        etcd=url, etcd_ca_file=cert, etcd_cert_file=cert, etcd_key_file=key
    )
    async with EtcdClient(EtcdAccess.of(settings), timeout_s=60.0) as etcd:
        await etcd.transact([], [ops.put(b"a", b"1")])
        found = (await etcd.get(b"a")).item
        assert found is not None
        assert found.value == b"1"
    bare = EtcdAccess(endpoints=parse_endpoints(url), ca=cert.read_bytes())
    async with EtcdClient(bare, timeout_s=3.0) as etcd:
        with pytest.raises(StoreUnavailableError):
            await etcd.get(b"a")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name in ("etcd_ca_file", "etcd_cert_file", "etcd_key_file", "etcd_password_file"):
        settings = CoordinatorSettings(etcd="http://a:1", **{name: tmp_path / "none"})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=name):
            EtcdAccess.of(settings)
