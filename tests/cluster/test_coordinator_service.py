"""The coordinator over a real server: policies, salts, members, bad requests."""

import asyncio
import json
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from kvferry.cluster import policy as policies
from kvferry.cluster.coordinator import Coordinator
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.coordinator_service import start_coordinator
from kvferry.errors import ConfigError, FencedError, ProtocolError, StoreUnavailableError
from kvferry.proto.keys import namespace_tag
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.settings import CoordinatorSettings

MODEL = bytes(range(32))


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


Serve: TypeAlias = Callable[..., AbstractAsyncContextManager[tuple[Coordinator, CoordinatorClient]]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def serve(tmp_path: Path, clock: Clock) -> Serve:
    """A coordinator over ``tmp_path/data``, and a client of it."""

    @asynccontextmanager
    async def running(
        policy_file: Path | None = None, data: str = "data"
    ) -> AsyncIterator[tuple[Coordinator, CoordinatorClient]]:
        settings = CoordinatorSettings(
            listen="127.0.0.1:0", data_dir=tmp_path / data, policy_file=policy_file
        )
        coordinator = await Coordinator.open(settings, clock)
        up = await start_coordinator(coordinator, settings)
        try:
            async with CoordinatorClient(up.addresses[0]) as client:
                yield coordinator, client
        finally:
            await up.stop()

    return running


def _register(node_id: str = "a", incarnation: int = 1, **fields: object) -> pb.RegisterRequest:
    return pb.RegisterRequest(node_id=node_id, incarnation=incarnation, **fields)  # type: ignore[arg-type]


async def _until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.05)


async def test_a_node_gets_salt_interval_and_the_peers_that_are_ready(
    serve: Serve, clock: Clock, tmp_path: Path
) -> None:
    async with serve() as (_, client):
        first = await client.register(_register("a", address="127.0.0.1:10"))
        assert len(first.namespace_salt) == 32
        assert first.heartbeat_interval_ms == 2000
        assert first.policy_version == 1
        assert not first.peers
        joining = await client.register(_register("b", address="127.0.0.1:11"))
        assert joining.namespace_salt == first.namespace_salt
        assert not joining.peers  # a is not ready yet
        await client.heartbeat(pb.HeartbeatRequest(node_id="a", incarnation=1))
        second = await client.heartbeat(pb.HeartbeatRequest(node_id="b", incarnation=1))
        assert [(p.node_id, p.address) for p in second.peers] == [("a", "127.0.0.1:10")]
        assert second.partial_peers  # others may not have spoken up yet
        clock.now += 11  # a sleeps
        beat = await client.heartbeat(pb.HeartbeatRequest(node_id="b", incarnation=1))
        assert beat.known
        assert not beat.peers
        assert not beat.partial_peers
    salt = tmp_path / "data" / "namespaces" / "default.salt"
    assert salt.read_bytes() == first.namespace_salt
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600


async def test_namespaces_are_known_by_name_and_tag(serve: Serve) -> None:
    async with serve() as (_, client):
        salt = (await client.register(_register())).namespace_salt
        assert await client.namespaces() == {"default": namespace_tag(salt)}


async def test_an_address_of_all_interfaces_is_told_to_nobody(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as (_, client):
        await client.register(_register("a", address="0.0.0.0:7801"))
        await client.register(_register("b"))
        for name in "ab":
            await client.heartbeat(pb.HeartbeatRequest(node_id=name, incarnation=1))
        reply = await client.register(_register("c", address="127.0.0.1:12"))
        assert not reply.peers
        assert sum("all interfaces" in record.message for record in caplog.records) == 1


async def test_members_go_away_come_back_and_are_gone(serve: Serve, clock: Clock) -> None:
    async with serve() as (coordinator, client):
        shard = pb.ShardInfo(model_id=MODEL, layer_start=0, layer_end=30)
        await client.register(_register("a", version="9.9", shards=[shard]))

        async def state() -> str:
            (member,) = (await client.members()).members
            return member.state

        assert await state() == "joining"
        clock.now += 11
        assert await state() == "away"
        beat = pb.HeartbeatRequest(
            node_id="a", incarnation=1, memory_used_share=0.25, shards=[shard],
            links=[pb.LinkSample(to="store", bytes_per_s=1e9, latency_s=0.001)],
        )  # fmt: skip
        assert (await client.heartbeat(beat)).known
        assert await state() == "ready"
        (member,) = (await client.members()).members
        assert member.last == beat
        assert member.version == "9.9"
        clock.now += 700
        assert await state() == "gone"
        assert coordinator.membership.counts()["gone"] == 1
        again = pb.HeartbeatRequest(node_id="a", incarnation=1)
        assert (await client.heartbeat(again)).known
        goodbye = pb.GoodbyeRequest(node_id="a", incarnation=1, phase=pb.NODE_PHASE_AWAY)
        await client.goodbye(goodbye)
        assert await state() == "away"
        assert (await client.heartbeat(again)).known
        assert await state() == "ready"
        goodbye.phase = pb.NODE_PHASE_GONE
        await client.goodbye(goodbye)
        assert await state() == "gone"
        assert not (await client.heartbeat(again)).known
        registry = coordinator.metrics.registry
        told = registry.get_sample_value("kvferry_coordinator_members", {"state": "gone"})
        assert told == 1


async def test_an_older_incarnation_is_fenced_over_the_wire(serve: Serve) -> None:
    async with serve() as (_, client):
        await client.register(_register("a", 2))
        with pytest.raises(FencedError, match="started again"):
            await client.heartbeat(pb.HeartbeatRequest(node_id="a", incarnation=1))
        with pytest.raises(FencedError):
            await client.register(_register("a", 1))
        later = await client.heartbeat(pb.HeartbeatRequest(node_id="a", incarnation=3))
        assert not later.known  # has to register first


async def test_a_drained_node_is_told_so_and_stays_a_peer(serve: Serve) -> None:
    async with serve() as (_, client):
        for name in "ab":
            await client.register(_register(name, address=f"127.0.0.1:{ord(name)}"))
            await client.heartbeat(pb.HeartbeatRequest(node_id=name, incarnation=1))
        asked = await client.drain("a")
        assert (asked.state, asked.drained) == ("draining", False)
        beat = pb.HeartbeatRequest(node_id="a", incarnation=1, drained=True)
        assert (await client.heartbeat(beat)).drain
        assert (await client.drain("a")).drained
        (peer,) = (await client.heartbeat(pb.HeartbeatRequest(node_id="b", incarnation=1))).peers
        assert peer.node_id == "a"
        (member, _) = (await client.members()).members
        assert (member.state, member.drained) == ("draining", True)
        assert (await client.drain("a", undo=True)).state == "joining"
        reply = await client.heartbeat(pb.HeartbeatRequest(node_id="a", incarnation=1))
        assert not reply.drain
        with pytest.raises(ConfigError, match="a, b"):
            await client.drain("c")


async def test_a_coordinator_without_a_salt_takes_over_the_first_nodes(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = bytes(range(100, 132))
    async with serve() as (_, client):
        assert (await client.register(_register("a", namespace_salt=kept))).namespace_salt == kept
        # Later ones cannot choose, and are told in the log.
        other = await client.register(_register("b", namespace_salt=bytes(32)))
        assert other.namespace_salt == kept
        assert sum("another namespace" in record.message for record in caplog.records) == 1
    async with serve() as (_, client):  # and it lasts
        assert (await client.register(_register("c"))).namespace_salt == kept
    async with serve(data="odd") as (_, client):
        odd = (await client.register(_register("a", namespace_salt=b"short"))).namespace_salt
        assert len(odd) == 32


async def test_a_watch_tells_at_once_and_on_change(serve: Serve) -> None:
    async with serve() as (_, client):
        watch = client.watch_policy("a")
        first = await anext(watch)
        assert (first.name, first.version) == ("default", 1)
        assert await client.set_policy(policies.named_policy("exact")) == 2
        async with asyncio.timeout(10):
            second = await anext(watch)
        assert (second.name, second.version) == ("exact", 2)
        # The same again is no new version.
        assert await client.set_policy(policies.named_policy("exact")) == 2
        await watch.aclose()


async def test_a_stopping_coordinator_ends_watches_with_an_error(serve: Serve) -> None:
    async with serve() as (coordinator, client):
        watch = client.watch_policy("a")
        await anext(watch)
        await coordinator.aclose()
        with pytest.raises(StoreUnavailableError, match="ended the policy watch"):
            await anext(watch)


async def test_what_the_operator_set_outlives_a_restart(serve: Serve) -> None:
    async with serve() as (_, client):
        await client.set_policy(policies.named_policy("high_compression"))
        salt = (await client.register(_register())).namespace_salt
    async with serve() as (_, client):
        found = await client.explain(1)
        assert (found.policy.name, found.policy.version) == ("high_compression", 2)
        assert found.source == "admin"
        beat = await client.heartbeat(pb.HeartbeatRequest(node_id="a", incarnation=1))
        assert not beat.known  # membership is soft: the node registers again
        assert (await client.register(_register())).namespace_salt == salt
        assert await client.set_policy(policies.named_policy("exact")) == 3


async def test_nodes_that_saw_a_later_version_push_ours_beyond_it(serve: Serve) -> None:
    async with serve() as (_, client):
        reply = await client.register(_register(policy_version=41))
        assert reply.policy_version == 42
        await client.heartbeat(pb.HeartbeatRequest(node_id="a", incarnation=1, policy_version=50))
        policy = await anext(client.watch_policy("a"))
        assert (policy.name, policy.version) == ("default", 51)
        # A number out of all bounds does not use up the versions.
        await client.register(_register(policy_version=(1 << 64) - 1))
        assert (await client.members()).policy_version == 51


async def test_a_damaged_policy_state_is_set_aside_and_a_damaged_salt_refused(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve() as (_, client):
        await client.register(_register())
        await client.set_policy(policies.named_policy("exact"))
    kept = tmp_path / "data" / "policy.json"
    kept.write_text(kept.read_text()[:50])
    async with serve() as (_, client):
        assert (await client.explain(0)).policy.name == "default"
    assert kept.with_suffix(".damaged").exists()
    salt = tmp_path / "data" / "namespaces" / "default.salt"
    salt.write_bytes(b"short")
    with pytest.raises(ConfigError, match="backup"):
        async with serve():
            pass


async def test_two_coordinators_do_not_share_a_folder(serve: Serve) -> None:
    async with serve():
        with pytest.raises(ConfigError, match="no other coordinator"):
            async with serve():
                pass
    async with serve():
        pass


async def test_a_policy_file_is_followed_and_a_broken_one_keeps_the_old(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.toml"
    path.write_text(policies.dump_policy(policies.named_policy("exact")))
    async with serve(path) as (coordinator, client):
        watch = client.watch_policy("a")
        assert (await anext(watch)).name == "exact"
        assert coordinator.policies.source == "file"
        path.write_text(policies.dump_policy(policies.named_policy("high_compression")))
        async with asyncio.timeout(10):
            changed = await anext(watch)
        assert (changed.name, changed.version) == ("high_compression", 2)
        path.write_text("name = 'x'\n[[rules]]\ncodec = 'gzip'\n")
        await _until(lambda: bool(coordinator.policies.problem))
        found = await client.explain(1)
        assert (found.policy.version, found.policy.name) == (2, "high_compression")
        assert "rules[0].codec" in found.problem
        await asyncio.sleep(1.2)  # two more looks at the same bad file
        registry = coordinator.metrics.registry
        errors = "kvferry_coordinator_policy_file_errors_total"
        assert registry.get_sample_value(errors) == 1
        assert registry.get_sample_value("kvferry_coordinator_policy_file_ok") == 0
        assert sum("refused" in record.message for record in caplog.records) == 1
        path.unlink()
        await _until(lambda: "No such file" in coordinator.policies.problem)
        assert registry.get_sample_value(errors) == 2
        path.write_text(policies.dump_policy(policies.named_policy("memory_emergency")))
        async with asyncio.timeout(10):
            mended = await anext(watch)
        assert (mended.name, mended.version) == ("memory_emergency", 3)
        await _until(lambda: not coordinator.policies.problem)
        assert registry.get_sample_value("kvferry_coordinator_policy_file_ok") == 1
        await watch.aclose()


async def test_the_file_wins_over_an_admin_only_when_it_changes(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "p.toml"
    path.write_text(policies.dump_policy(policies.named_policy("exact")))
    async with serve(path) as (_, client):
        assert await client.set_policy(policies.default_policy()) == 2
    async with serve(path) as (_, client):  # the file is as it was: the admin's word stands
        found = await client.explain(0)
        assert (found.policy.name, found.policy.version, found.source) == ("default", 2, "admin")
    path.write_text(policies.dump_policy(policies.named_policy("high_compression")))
    async with serve(path) as (_, client):
        found = await client.explain(0)
        assert (found.policy.name, found.policy.version) == ("high_compression", 3)
    path.write_text("rules = 1")  # broken while we were down: the last policy holds
    async with serve(path) as (_, client):
        found = await client.explain(0)
        assert (found.policy.name, found.policy.version) == ("high_compression", 3)
        assert found.problem


async def test_a_first_start_with_a_broken_file_is_refused(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("rules = 1")
    with pytest.raises(ConfigError, match=r"p\.toml: rules"):
        async with serve(path):
            pass
    path.write_text("")
    async with serve(path):  # and the folder is free again
        pass


async def test_a_policy_that_cannot_hold_is_refused_and_counted(serve: Serve) -> None:
    async with serve() as (coordinator, client):
        bad = policies.default_policy()
        bad.rules[0].codec = "gzip"
        with pytest.raises(ConfigError, match=r"rules\[0\].codec"):
            await client.set_policy(bad)
        value = coordinator.metrics.registry.get_sample_value(
            "kvferry_coordinator_refused_calls_total", {"reason": "config"}
        )
        assert value == 1
        assert (await client.members()).policy_version == 1


async def test_a_policy_that_cannot_be_written_down_is_not_given_out(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve() as (coordinator, client):
        (tmp_path / "data" / "policy.json").unlink()
        (tmp_path / "data" / "policy.json").mkdir()
        with pytest.raises(StoreUnavailableError, match="not written down"):
            await client.set_policy(policies.named_policy("exact"))
        assert coordinator.policies.policy.name == "default"
        assert not [p for p in (tmp_path / "data").iterdir() if p.name.startswith(".")]
        (tmp_path / "data" / "policy.json").rmdir()
        assert await client.set_policy(policies.named_policy("exact")) == 2


async def test_explain_answers_for_the_model_asked(serve: Serve) -> None:
    async with serve() as (_, client):
        policy = policies.default_policy()
        policy.rules.insert(0, pb.LayerRule(model=MODEL.hex()[:8], layer_end=2, codec="raw"))
        await client.set_policy(policy)
        told = (await client.explain(3, MODEL)).layers
        assert [(x.layer, x.codec) for x in told] == [(0, "raw"), (1, "raw"), (2, "ferry")]
        assert "rule 1" in told[0].why
        assert [x.codec for x in (await client.explain(1)).layers] == ["ferry"]


async def test_restores_are_counted_by_outcome(serve: Serve) -> None:
    async with serve() as (coordinator, client):
        done = pb.RestoreReport(
            node_id="a", tokens=512, bytes=1000, seconds=0.2, outcome="restored"
        )
        await client.report_restore(done)
        await client.report_restore(done)
        for outcome in ("timeout", 'odd"\n', *(f"reason_{i}" for i in range(80))):
            await client.report_restore(pb.RestoreReport(node_id="a", outcome=outcome))
        sample = coordinator.metrics.registry.get_sample_value
        assert sample("kvferry_restores_total", {"outcome": "restored"}) == 2
        assert sample("kvferry_restores_total", {"outcome": "timeout"}) == 1
        assert (sample("kvferry_restores_total", {"outcome": "other"}) or 0) > 10
        assert sample("kvferry_restored_tokens_total") == 1024
        assert sample("kvferry_restored_bytes_total") == 2000


@pytest.mark.parametrize(
    "request_",
    [
        pb.RegisterRequest(),
        pb.RegisterRequest(node_id="a b"),
        pb.RegisterRequest(node_id="a" * 200),
        pb.RegisterRequest(node_id="a", address="nowhere"),
        pb.RegisterRequest(node_id="a", version="v" * 100),
        pb.RegisterRequest(node_id="a", shards=[pb.ShardInfo(model_id=b"x", layer_end=1)]),
        pb.RegisterRequest(node_id="a", shards=[pb.ShardInfo(model_id=MODEL)]),
        pb.HeartbeatRequest(node_id="a", memory_used_share=float("nan")),
        pb.HeartbeatRequest(node_id="a", links=[pb.LinkSample(to="b", bytes_per_s=-1)]),
        pb.HeartbeatRequest(node_id="a", links=[pb.LinkSample(to="b", kind="k" * 200)]),
        pb.HeartbeatRequest(node_id="a", links=[pb.LinkSample(to="b", age_s=-1)]),
        pb.HeartbeatRequest(
            node_id="a", exo=pb.ExoState(nodes=[pb.ExoNode(node_id="x" * 2_000_000)])
        ),
        pb.HeartbeatRequest(node_id="a", counters={"c" * 200: 1}),
        pb.RegisterRequest(node_id="a", namespace_salt=bytes(100)),
        pb.GoodbyeRequest(node_id="a", phase=pb.NODE_PHASE_READY),
        pb.RestoreReport(node_id="a", seconds=float("inf")),
    ],
)
async def test_a_request_against_the_contract_is_refused(serve: Serve, request_: object) -> None:
    async with serve() as (_, client):
        calls = {
            pb.RegisterRequest: client.register,
            pb.HeartbeatRequest: client.heartbeat,
            pb.GoodbyeRequest: client.goodbye,
            pb.RestoreReport: client.report_restore,
        }
        with pytest.raises(ProtocolError):
            await calls[type(request_)](request_)  # type: ignore[index]
        assert not (await client.members()).members


async def test_a_missing_coordinator_is_one_error_within_the_deadline() -> None:
    async with CoordinatorClient("127.0.0.1:1", timeout_s=2) as client:
        with pytest.raises(StoreUnavailableError, match=r"coordinator 127\.0\.0\.1:1"):
            await client.members()
        with pytest.raises(StoreUnavailableError):
            await anext(client.watch_policy("a"))


async def test_closing_the_client_ends_its_calls(serve: Serve) -> None:
    async with serve() as (_, client):
        watch = client.watch_policy("a")
        await anext(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.1)
        await client.aclose()
        with pytest.raises(StoreUnavailableError):
            await waiting


async def test_what_is_kept_is_plain_json_that_names_the_policy(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve() as (_, client):
        await client.set_policy(policies.named_policy("exact"))
    kept = json.loads((tmp_path / "data" / "policy.json").read_text())
    assert (kept["version"], kept["source"]) == (2, "admin")
    assert policies.parse_policy(kept["policy"].encode()).name == "exact"
