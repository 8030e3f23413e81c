"""Tokens: who may do what, and that nobody learns them."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from security_samples import of
from store_samples import ROOT, blob, digest, local_store

from kvferry.cluster import guard
from kvferry.cluster.authority import ADMIN_FILE, Authority
from kvferry.cluster.backends import MemoryBackend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.coordinator import Coordinator
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.coordinator_service import start_coordinator
from kvferry.cluster.credentials import Credentials
from kvferry.cluster.policy import named_policy
from kvferry.cluster.repository import ListQuery
from kvferry.cluster.server import start_server
from kvferry.cluster.tokens import Right, TokenBook, issue_token, load_entries, save_entries
from kvferry.errors import (
    BlobNotFoundError,
    ConfigError,
    FerryError,
    NotAllowedError,
    StoreUnavailableError,
    TokenRefusedError,
    WrongNamespaceError,
)
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1 import link_pb2, peer_pb2, store_pb2
from kvferry.settings import CoordinatorSettings

KEY, DATA = blob()
OURS, THEIRS = 0xFEDC_BA98_7654_3210, 0x0123_4567_89AB_CDEF


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca")


def bearing(authority: Authority, right: Right, namespace: str = "default") -> Credentials:
    """A caller on loopback without TLS."""
    return Credentials(token=authority.token(namespace, right).strip())


@asynccontextmanager
async def serving(authority: Authority, refused: list[str]) -> AsyncIterator[str]:
    async with local_store(MemoryBackend()) as store:
        server = await start_server(
            [blob_store_service(BlobStoreServicer(store))],
            ["127.0.0.1:0"],
            credentials=Credentials(book=TokenBook(authority.folder / "tokens.json")),
            on_refused=refused.append,
        )
        try:
            yield server.addresses[0]
        finally:
            await server.stop(0)


async def test_each_token_may_do_what_it_is_for(authority: Authority) -> None:
    rights = [bearing(authority, right) for right in Right]
    refused: list[str] = []
    async with serving(authority, refused) as address:
        reader, writer, admin = (
            BlobStoreClient(address, timeout_s=10.0, credentials=shown) for shown in rights
        )
        async with reader, writer, admin:
            assert await reader.has([KEY]) == [False]
            with pytest.raises(NotAllowedError, match="Put needs the right to write"):
                await reader.put(KEY, DATA)
            with pytest.raises(NotAllowedError):
                await reader.delete([KEY])
            assert await writer.put(KEY, DATA)
            assert bytes(await reader.get(KEY)) == DATA
            with pytest.raises(NotAllowedError, match="list of all blobs"):
                [batch async for batch in reader.list()]
            named = ListQuery(page_key=KEY.page_key)
            assert [info.key async for batch in reader.list(named) for info in batch] == [KEY]
            hanging = ListQuery(previous_key=ROOT)
            assert [info.key async for batch in reader.list(hanging) for info in batch] == [KEY]
            elsewhere = ListQuery(previous_key=digest("elsewhere"))
            assert [info.key async for batch in reader.list(elsewhere) for info in batch] == []
            assert [info.key async for batch in admin.list() for info in batch] == [KEY]
            await admin.pin([KEY], 100)
            seen, all_of_it = await reader.stat(), await admin.stat()
            assert (list(seen.leases), list(seen.namespaces)) == ([], [])
            assert (len(all_of_it.leases), len(all_of_it.namespaces)) == (1, 1)
            with pytest.raises(NotAllowedError, match="Scrub needs the right to admin"):
                [report async for report in writer.scrub()]
            assert [report async for report in admin.scrub()]
            assert await admin.delete([KEY]) == 1
    assert refused == ["not_allowed"] * 3  # the listing is counted by the service


async def test_a_token_writes_in_its_own_namespace_only(authority: Authority) -> None:
    ours, theirs, nobody = (
        bearing(authority, Right.WRITE, name) for name in ("ours", "theirs", "nobody")
    )
    admin = bearing(authority, Right.ADMIN)
    assert authority.bind("ours", OURS) == 1
    assert authority.bind("theirs", THEIRS) == 1
    later = bearing(authority, Right.WRITE, "ours")  # bound as those before
    refused: list[str] = []
    async with serving(authority, refused) as address:

        async def put(shown: Credentials, namespace: int, size: int = 2000) -> bool:
            key, data = blob(digest(shown.token, namespace, size), namespace=namespace, size=size)
            async with BlobStoreClient(address, timeout_s=10.0, credentials=shown) as client:
                try:
                    return await client.put(key, data)
                finally:
                    async with BlobStoreClient(address, credentials=admin) as looking:
                        held[namespace] = await looking.has([key]) == [True]

        held: dict[int, bool] = {}
        for shown in (ours, later):
            assert await put(shown, OURS)
            assert await put(shown, 0)  # of no namespace: as before
            for tag, whose in ((THEIRS, "namespace theirs"), (77, "another namespace")):
                for size in (2000, 9 << 20):
                    with pytest.raises(WrongNamespaceError, match=whose) as found:
                        await put(shown, tag, size)
                    assert "certs bind ours" in str(found.value)
                    assert not held[tag]
        # A token of a namespace that nobody bound: what is not another's passes.
        assert await put(nobody, 77)
        assert await put(nobody, 0)
        with pytest.raises(WrongNamespaceError, match="namespace ours"):
            await put(nobody, OURS)
        with pytest.raises(WrongNamespaceError, match="namespace ours"):
            await put(theirs, OURS)
        assert await put(admin, OURS)
        assert await put(admin, THEIRS)
        async with BlobStoreClient(address, credentials=admin) as client:
            uses = {use.tag: use.blobs for use in (await client.stat()).namespaces}
        assert uses == {0: 3, OURS: 3, THEIRS: 1, 77: 1}


async def test_a_staged_blob_is_refused_as_well(authority: Authority) -> None:
    ours = bearing(authority, Right.WRITE, "ours")
    authority.bind("ours", OURS)
    key, data = blob(namespace=THEIRS)
    async with (
        serving(authority, []) as address,
        BlobStoreClient(address, timeout_s=10.0, credentials=ours) as client,
    ):
        with pytest.raises(WrongNamespaceError):
            await client.put(key, data, stage=True)
        with pytest.raises(BlobNotFoundError):
            await client.commit([key])


async def test_binding_is_followed_without_a_restart_and_undone(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "FOLLOW_S", 0.02)
    ours = bearing(authority, Right.WRITE, "ours")
    async with (
        serving(authority, []) as address,
        BlobStoreClient(address, timeout_s=10.0, credentials=ours) as client,
    ):

        async def taken() -> bool:
            key, data = blob(digest(os.urandom(8)), namespace=THEIRS)
            try:
                return await client.put(key, data)
            except WrongNamespaceError:
                return False

        assert await taken()
        for tag, wanted in ((OURS, False), (0, True)):
            authority.bind("ours", tag)
            for _ in range(500):
                if await taken() is wanted:
                    break
                await asyncio.sleep(0.02)
            else:
                pytest.fail("the new list is not taken over")


def test_a_tag_and_a_namespace_belong_together(authority: Authority, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        authority.token(name, Right.WRITE)
    authority.bind("ours", OURS)
    with pytest.raises(ConfigError, match="that of ours"):
        authority.bind("theirs", OURS)
    with pytest.raises(ConfigError, match="has tokens"):
        authority.bind("nobodys", 5)
    entries = authority.entries()
    tags = {entry.bearer.namespace: entry.bearer.tag for entry in entries}
    assert tags == {"default": 0, "ours": OURS, "theirs": 0}
    twice = [replace(e, bearer=replace(e.bearer, tag=OURS)) for e in entries]
    save_entries(tmp_path / "t.json", twice)
    with pytest.raises(ConfigError, match="belong together"):
        load_entries(tmp_path / "t.json")


async def test_no_token_and_a_wrong_one_are_refused_whole_uploads_too(
    authority: Authority,
) -> None:
    wrong, _ = issue_token("default", Right.ADMIN)
    refused: list[str] = []
    key, data = blob(size=3 << 20)
    async with serving(authority, refused) as address:
        for shown, told in (
            (Credentials(), "no token came with the call"),
            (Credentials(token=wrong), "kvferry certs token"),
            (Credentials(token=" ".join("xyz")), "not known there"),
        ):
            async with BlobStoreClient(address, timeout_s=10.0, credentials=shown) as client:
                for call in (client.has([key]), client.put(key, data), client.get(key)):
                    with pytest.raises(TokenRefusedError, match=told) as found:
                        await call
                    assert address in str(found.value)
                    assert wrong not in str(found.value)
    assert refused == ["token_refused"] * 9


async def test_health_needs_no_token_and_reflection_does(authority: Authority) -> None:
    async with serving(authority, []) as address, grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        reply = await health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        with pytest.raises(grpc.aio.AioRpcError) as found:
            await call.read()
        assert found.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_calls_that_nobody_opened_need_the_highest_right() -> None:
    assert guard.right_for("/kvferry.v1.BlobStore/Tomorrow") is Right.ADMIN
    names = {
        f"/{service.full_name}/{method.name}"
        for file in (store_pb2, pb, link_pb2, peer_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(guard.RIGHTS) <= names


async def test_new_and_revoked_tokens_are_followed_without_a_restart(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "FOLLOW_S", 0.02)
    async with serving(authority, []) as address:
        shown = bearing(authority, Right.READ)
        async with BlobStoreClient(address, timeout_s=10.0, credentials=shown) as client:
            assert await until_served(client)
            tokens = authority.folder / "tokens.json"
            whole = tokens.read_bytes()
            tokens.write_text("{")
            await asyncio.sleep(0.2)
            assert await client.has([KEY]) == [False]
            assert "going on with the tokens known before" in caplog.text
            tokens.write_bytes(whole)
            assert authority.revoke(authority.entries()[-1].digest.hex()[:12]) == 1
            for _ in range(200):
                try:
                    await client.has([KEY])
                except TokenRefusedError:
                    break
                await asyncio.sleep(0.02)
            else:
                pytest.fail("the revoked token is still taken")


async def until_served(client: BlobStoreClient) -> bool:
    for _ in range(200):
        try:
            await client.has([KEY])
        except TokenRefusedError:
            await asyncio.sleep(0.02)
        else:
            return True
    return False


async def test_a_namespaces_salt_is_for_its_bearers_only(
    authority: Authority, tmp_path: Path
) -> None:
    ours, theirs = (bearing(authority, Right.WRITE, name) for name in ("ours", "theirs"))
    reader = bearing(authority, Right.READ, "ours")
    settings = CoordinatorSettings.load(
        listen="127.0.0.1:0",
        data_dir=tmp_path / "coordinator",
        tokens_file=authority.folder / "tokens.json",
    )
    running = await start_coordinator(await Coordinator.open(settings), settings)
    address = running.addresses[0]

    async def salt(shown: Credentials, name: str) -> bytes:
        async with CoordinatorClient(address, credentials=shown) as client:
            request = pb.RegisterRequest(node_id=name, incarnation=1)
            return (await client.register(request)).namespace_salt

    try:
        first = await salt(ours, "a")
        assert len(first) == 32
        assert await salt(reader, "b") == first
        assert await salt(theirs, "c") != first
        for nobody in (Credentials(), Credentials(token=issue_token("ours", Right.ADMIN)[0])):
            with pytest.raises(TokenRefusedError):
                await salt(nobody, "d")
        async with CoordinatorClient(address, credentials=ours) as client:
            with pytest.raises(NotAllowedError):
                await client.set_policy(named_policy("exact"))
        admin = (authority.folder / ADMIN_FILE).read_text().strip()
        async with CoordinatorClient(address, credentials=Credentials(token=admin)) as client:
            assert await client.set_policy(named_policy("exact")) > 0
    finally:
        await running.stop()


def test_tokens_are_kept_hashed_and_never_shown(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bundle = authority.issue("studio")
    text = (bundle / "token").read_text().strip()
    for path in authority.folder.rglob("tokens.json"):
        assert text not in path.read_text()
    shown = of(bundle)
    assert shown.token == text
    assert text not in repr(shown)
    assert "PRIVATE" not in repr(shown)
    assert text not in caplog.text
    assert shown.book is not None
    bearer = shown.book.bearer(text)
    assert bearer is not None
    assert (bearer.namespace, bearer.right) == ("default", Right.WRITE)
    assert shown.book.bearer(text[:-1]) is None
    assert shown.book.bearer("") is None
    assert shown.book.bearer("\udcff") is None


def test_machines_of_a_namespace_need_no_new_list_when_one_is_added(authority: Authority) -> None:
    first = of(authority.issue("one"))
    assert first.book is not None
    second = authority.issue("two")
    assert first.book.bearer((second / "token").read_text().strip()) is not None
    third = authority.issue("three", namespace="guests")
    assert first.book.bearer((third / "token").read_text().strip()) is None
    assert first.book.refresh()  # its folder has the new list, too
    assert first.book.bearer((third / "token").read_text().strip()) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 9, "tokens": []}',
        '{"version": 1, "tokens": [{}]}',
        '{"version": 1, "tokens": {"a": 1}}',
        '{"version": 1, "tokens": [{"hash": "00", "namespace": "x", "right": "read", '
        '"label": "", "issued": ""}]}',
        '{"version": 1, "tokens": [{"hash": "%s", "namespace": "..", "right": "read", '
        '"label": "", "issued": ""}]}' % ("0" * 64),
        '{"version": 1, "tokens": [{"hash": "%s", "namespace": "x", "right": "read", '
        '"label": "", "issued": "", "tag": "12"}]}' % ("0" * 64),
    ],
)
def test_damaged_lists_of_tokens_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_entries(path)
    with pytest.raises(ConfigError):
        TokenBook(tmp_path / "missing.json")


def test_a_token_that_others_could_read_is_refused(authority: Authority) -> None:
    bundle = authority.issue("studio")
    (bundle / "token").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        of(bundle)
    (bundle / "token").chmod(0o600)
    (bundle / "token").write_text("kvf_short")
    with pytest.raises(ConfigError, match="one token") as found:
        of(bundle)
    assert "kvf_short" not in str(found.value)


def test_a_list_round_trips(tmp_path: Path) -> None:
    entries = [issue_token(f"n{i}", right, "label", i)[1] for i, right in enumerate(Right)]
    save_entries(tmp_path / "t.json", entries)
    assert load_entries(tmp_path / "t.json") == entries
    assert os.stat(tmp_path / "t.json").st_mode & 0o077 == 0  # noqa: PTH116


def test_a_refused_token_is_tried_again_and_a_missing_right_is_not() -> None:
    assert issubclass(TokenRefusedError, StoreUnavailableError)
    assert not issubclass(NotAllowedError, StoreUnavailableError)
    for error in (TokenRefusedError("s", "p"), NotAllowedError("Put", "write", "read")):
        assert isinstance(error, FerryError)
        assert "\n" not in str(error)


async def test_a_second_server_with_the_same_credentials_can_start(authority: Authority) -> None:
    shown = replace(of(authority.issue("studio")))
    servers = [await start_server([], ["127.0.0.1:0"], credentials=shown) for _ in range(2)]
    for server in servers:
        await server.stop(0)
