"""Mutual TLS between real servers and clients; who is refused is told what to do."""

import asyncio
import logging
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from security_samples import expired, of, unchecked
from store_samples import blob, local_store

from kvferry.cluster.authority import CA_KEY_FILE, Authority
from kvferry.cluster.backends import MemoryBackend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.server import GrpcServer, start_server
from kvferry.cluster.tls import TlsFiles
from kvferry.errors import ConfigError, StoreUnavailableError

KEY, DATA = blob()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca")


@asynccontextmanager
async def serving(credentials: Credentials) -> AsyncIterator[str]:
    """Address of a store that asks for certificates, and for no tokens."""
    async with local_store(MemoryBackend()) as store:
        server: GrpcServer = await start_server(
            [blob_store_service(BlobStoreServicer(store))],
            ["127.0.0.1:0"],
            credentials=replace(credentials, book=None),
        )
        try:
            yield server.addresses[0]
        finally:
            await server.stop(0)


async def asked(address: str, credentials: Credentials) -> str:
    """What a caller is told; "" where it is served."""
    async with BlobStoreClient(address, timeout_s=5.0, credentials=credentials) as client:
        try:
            await client.has([KEY])
        except StoreUnavailableError as exc:
            return str(exc)
    return ""


async def test_machines_of_one_authority_talk(authority: Authority) -> None:
    one, two = (of(authority.issue(name)) for name in ("one", "two"))
    async with (
        serving(one) as address,
        BlobStoreClient(address, timeout_s=10.0, credentials=two) as client,
    ):
        assert await client.put(KEY, DATA)
        assert bytes(await client.get(KEY)) == DATA


async def test_callers_without_a_certificate_of_the_authority_are_refused(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority.create(tmp_path / "other").issue("stranger")
    theirs = unchecked(stranger)
    mine = of(authority.issue("client"))
    # It trusts the server's authority, and shows a certificate of another one.
    assert mine.pem is not None
    assert theirs.pem is not None
    mixed = replace(theirs, pem=replace(theirs.pem, ca=mine.pem.ca))
    async with serving(of(authority.issue("server"))) as address:
        for caller in (PLAINTEXT, mixed, unchecked(expired(authority))):
            told = await asked(address, caller)
            assert "kvferry certs issue" in told
            assert "tls_dir" in told
        assert await asked(address, mine) == ""


async def test_servers_that_cannot_be_trusted_are_refused(
    authority: Authority, tmp_path: Path
) -> None:
    mine = of(authority.issue("client"))
    stranger = Authority.create(tmp_path / "other").issue("stranger")
    async with serving(unchecked(stranger)) as address:
        assert "another authority" in await asked(address, mine)
    async with serving(unchecked(expired(authority))) as address:
        assert "certificate is over" in await asked(address, mine)
    async with serving(PLAINTEXT) as address:
        assert "does not speak TLS" in await asked(address, mine)


async def test_a_certificate_for_other_addresses_is_refused(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = of(authority.issue("client"))
    monkeypatch.setattr("kvferry.cluster.authority.OWN_HOSTS", ())
    elsewhere = of(authority.issue("server", ["192.0.2.7"]))
    async with serving(elsewhere) as address:
        told = await asked(address, mine)
    assert "--host" in told


async def test_a_renewed_certificate_is_used_without_a_restart(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = of(authority.issue("client"))
    monkeypatch.setattr("kvferry.cluster.authority.OWN_HOSTS", ())
    server = of(authority.issue("server", ["192.0.2.7"]))
    async with serving(server) as address:
        assert "--host" in await asked(address, mine)
        authority.issue("server", ["192.0.2.7", "127.0.0.1"])
        assert await asked(address, mine) == ""


async def test_files_that_vanish_meanwhile_leave_the_last_certificate_in_use(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    server = of(authority.issue("server"))
    mine = of(authority.issue("client"))
    async with serving(server) as address:
        assert server.tls is not None
        server.tls.cert.unlink()
        assert await asked(address, mine) == ""
        assert "going on with the last certificate" in caplog.text


def test_keys_are_their_owners_only_and_an_authority_is_never_overwritten(
    authority: Authority,
) -> None:
    bundle = authority.issue("studio", ["192.168.1.20", "studio.local"])
    for folder in (authority.folder, bundle):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = [authority.folder / CA_KEY_FILE, bundle / "key.pem", bundle / "token"]
    for path in secret:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = (authority.folder / CA_KEY_FILE).read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        Authority.create(authority.folder)
    assert (authority.folder / CA_KEY_FILE).read_bytes() == before
    expiry = TlsFiles.of_folder(bundle).check()
    assert {"studio", "192.168.1.20", "studio.local", "127.0.0.1"} <= set(expiry.hosts)
    assert 89 < expiry.days_left <= 90


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("../up", {}),
        ("", {}),
        (".hidden", {}),
        ("x", {"hosts": ["a b"]}),
        ("x", {"hosts": ["h:7800"]}),
        ("x", {"days": 0}),
        ("x", {"days": 5000}),
        ("x", {"namespace": "../x"}),
    ],
)
def test_names_that_cannot_be_are_refused(
    authority: Authority, name: str, more: dict[str, object]
) -> None:
    with pytest.raises(ConfigError):
        authority.issue(name, **more)  # type: ignore[arg-type]


def test_files_that_do_not_fit_are_named(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    foreign = Authority.create(tmp_path / "other").issue("x")

    def refused(match: str, **changed: bytes) -> None:
        folder = tmp_path / f"case-{len(list(tmp_path.iterdir()))}"
        folder.mkdir(mode=0o700)
        for part in ("ca", "cert", "key"):
            path = folder / f"{part}.pem"
            path.write_bytes(changed.get(part, (good / f"{part}.pem").read_bytes()))
            path.chmod(0o600)
        with pytest.raises(ConfigError, match=match) as found:
            of(folder)
        assert "\n" not in str(found.value)

    refused("the key of", key=(other / "key.pem").read_bytes())
    refused("certificate of the authority", ca=(foreign / "ca.pem").read_bytes())
    refused("PEM certificate", cert=b"nothing")
    refused("PEM key", key=b"nothing")
    refused("at most", ca=b"x" * 300_000)
    over = expired(authority)
    with pytest.raises(ConfigError, match=r"it ended on .*kvferry certs issue"):
        of(over)
    with pytest.raises(ConfigError, match="can be read"):
        of(tmp_path / "nowhere")
    (good / "key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        of(good)


def test_a_certificate_close_to_its_end_is_said_so(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        of(authority.issue("fresh"))
    assert not caplog.text
    bundle = authority.issue("aging", days=20)
    assert not TlsFiles.of_folder(bundle).check().soon  # a third of its life is not over
    aging = replace(TlsFiles.of_folder(bundle).check())
    late = replace(aging, begins=aging.begins.replace(year=aging.begins.year - 1))
    assert late.soon


async def test_beyond_loopback_both_are_wanted(authority: Authority) -> None:
    both = of(authority.issue("server"))
    only_tls, only_tokens = replace(both, book=None), replace(both, tls=None, pem=None)
    for credentials, missing in (
        (PLAINTEXT, "no TLS .* and no tokens"),
        (only_tls, "no tokens"),
        (only_tokens, "no TLS"),
    ):
        with pytest.raises(ConfigError, match=missing) as found:
            await start_server([], ["0.0.0.0:0"], credentials=credentials)
        assert "kvferry certs" in str(found.value)
    server = await start_server([], ["0.0.0.0:0"], credentials=both)
    await server.stop(0)


async def test_a_token_does_not_leave_the_machine_in_plain_text(authority: Authority) -> None:
    shown = replace(of(authority.issue("client")), tls=None, pem=None)
    with pytest.raises(ConfigError, match="over TLS"):
        BlobStoreClient("192.0.2.1:7800", credentials=shown)
    await BlobStoreClient("127.0.0.1:7800", credentials=shown).aclose()
    allowed = replace(shown, plaintext=True)
    await BlobStoreClient("192.0.2.1:7800", credentials=allowed).aclose()
    await asyncio.sleep(0)
