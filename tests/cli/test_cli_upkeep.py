"""`kvferry pin`, `prune` and `quota` against real daemons: what goes, and what stays."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvferry.cli import pin, prune, quota, status
from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.repository import ListQuery
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import ConfigError, FerryError
from kvferry.node.client import NodeClient
from kvferry.proto import container
from kvferry.proto.keys import BlobKey, namespace_tag, page_keys, root_key, state_key, tail_key
from kvferry.proto.v1 import blob_pb2

pytestmark = [pytest.mark.processes]

MODEL, OTHER = b"\x11" * 32, b"\x22" * 32
KINDS = {
    "page": blob_pb2.BLOB_KIND_PAGE,
    "tail": blob_pb2.BLOB_KIND_TAIL,
    "state": blob_pb2.BLOB_KIND_STATE,
    "calibration": blob_pb2.BLOB_KIND_CALIBRATION,
}
CALIBRATION = b"\x33" * 32


class Setting:
    """A store, a coordinator and a node; an empty store at each test's beginning."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.folder, self.socket = folder, socket
        self.store = json.loads((folder / "store.ready.json").read_text())["address"]
        self.coordinator = json.loads((folder / "coordinator.ready.json").read_text())["address"]
        self.client = SyncBlobStoreClient(self.store)
        with NodeClient(socket, timeout_s=10.0) as node:
            end = time.monotonic() + 30
            while not (salt := node.hello().namespace_salt):
                assert time.monotonic() < end
                time.sleep(0.05)
        self.salt = salt

    def put(
        self,
        kind: str,
        key: bytes,
        previous: bytes,
        tokens: tuple[int, int],
        *,
        model: bytes = MODEL,
        namespace: int = 0,
        size: int = 2000,
        calibration: bytes = b"",
    ) -> BlobKey:
        data = os.urandom(size)
        header = blob_pb2.BlobHeader(
            kind=KINDS[kind],  # type: ignore[arg-type]
            model_id=model,
            page_key=key,
            previous_key=previous,
            token_start=tokens[0],
            token_end=tokens[1],
            layer_end=2,
            head_end=1,
            model_layers=2,
            model_heads=1,
            codec=blob_pb2.CodecSpec(
                name="raw", version=1, params_json="{}", calibration_id=calibration
            ),
            namespace_tag=namespace,
        )
        raw = container.pack(header, [container.SectionData("k", data, len(data))])
        name = container.key_of(container.read_header(raw))
        assert self.client.put(name, raw)
        return name

    def prompt(self, tokens: list[int], **fields: Any) -> list[BlobKey]:
        """Pages, a tail and a state of a prompt; pages that are there already are left."""
        root = root_key(self.salt, fields.get("model", MODEL))
        keys = page_keys(root, tokens)
        made = []
        for i, key in enumerate(keys):
            if not list(self.client.list(ListQuery(page_key=key))):
                before = keys[i - 1] if i else root
                made.append(self.put("page", key, before, (256 * i, 256 * i + 256), **fields))
        start = 256 * len(keys)
        last = keys[-1] if keys else root
        tail = tail_key(last, tokens[start:])
        made.append(self.put("tail", tail, last, (start, len(tokens)), **fields))
        made.append(self.put("state", state_key(tail), last, (start, len(tokens)), **fields))
        return made

    def held(self) -> set[BlobKey]:
        return {info.key for batch in self.client.list() for info in batch}

    def run(self, *arguments: str, code: int = 0) -> str:
        app = typer.Typer()
        for module in (pin, prune, quota, status):
            module.register(app)
        result = CliRunner().invoke(app, list(arguments))
        if isinstance(result.exception, FerryError):
            raise result.exception
        assert result.exit_code == code, (result.output, result.exception)
        return result.stdout

    def ask(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(*arguments, "--json", "-", code=code))
        return found

    def places(self) -> list[str]:
        return ["--store", self.store, "--socket", str(self.socket)]

    def file(self, tokens: list[int]) -> str:
        path = self.folder / "tokens.json"
        path.write_text(json.dumps(tokens))
        return str(path)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("upkeep")
    cluster = Cluster(folder, nodes=1)
    cluster.set_policy("exact")
    with cluster:
        yield Setting(folder, cluster.sockets[0])


@pytest.fixture
def setting(running: Setting) -> Setting:
    running.client.delete(sorted(running.held()))
    return running


def tokens(count: int, seed: int = 0) -> list[int]:
    return [(i * 7919 + seed * 31) % 49_000 for i in range(count)]


def test_a_prompt_goes_and_what_it_shares_stays(setting: Setting) -> None:
    ours = tokens(1000)
    theirs = [*ours[:600], *tokens(300, 5)]
    mine, others = setting.prompt(ours), setting.prompt(theirs)
    calibration = setting.put("calibration", CALIBRATION, b"", (0, 0))
    given = ["prune", "--tokens", setting.file(ours), "--model", MODEL.hex(), *setting.places()]
    told = setting.ask(*given, "--dry-run")
    # Two pages are shared with the other prompt, one page, a tail and a state are not.
    assert (told["blobs"], told["deleted"]) == (3, 0)
    assert {kind: n["blobs"] for kind, n in told["kinds"].items()} == dict.fromkeys(
        ("page", "tail", "state"), 1
    )
    assert setting.held() == {*mine, *others, calibration}
    assert setting.ask(*given, "--yes")["deleted"] == 3
    assert setting.held() == {*mine[:2], *others, calibration}
    assert setting.ask(*given, "--yes")["blobs"] == 0
    assert setting.ask(*given, "--yes", "--with-prefix")["deleted"] == 2
    assert setting.held() == {*others, calibration}


def test_a_conversations_earlier_ends_go_with_it(setting: Setting) -> None:
    long = tokens(1300)
    first, second = setting.prompt(long[:700]), setting.prompt(long)
    apart = setting.prompt(tokens(300, 9))
    given = ["--tokens", setting.file(long), "--model", MODEL.hex(), *setting.places()]
    assert setting.ask("prune", *given, "--yes")["deleted"] == len(first) + len(second)
    assert setting.held() == set(apart)


def test_a_shorter_prompt_leaves_the_longer_one_whole(setting: Setting) -> None:
    long = tokens(1300)
    first, second = setting.prompt(long[:700]), setting.prompt(long)
    given = ["--tokens", setting.file(long[:700]), "--model", MODEL.hex(), *setting.places()]
    assert setting.ask("prune", *given, "--yes")["deleted"] == 2
    assert setting.held() == {*first[:2], *second}


def test_filters_must_all_fit(setting: Setting) -> None:
    tag = namespace_tag(setting.salt)
    ours = setting.prompt(tokens(600), namespace=tag)
    nobodys = setting.prompt(tokens(600, 3))
    other = setting.prompt(tokens(600), model=OTHER, namespace=tag)
    calibration = setting.put("calibration", CALIBRATION, b"", (0, 0))
    store = ["--store", setting.store, "--coordinator", setting.coordinator]
    where = [*store, "--socket", str(setting.socket)]
    assert setting.ask("prune", "--older-than", "1h", *where)["blobs"] == 0
    assert setting.ask("prune", "--unused-for", "5m", *where)["blobs"] == 0
    found = setting.ask("prune", "--namespace", "default", "--dry-run", *where)
    assert found["blobs"] == len(ours) + len(other)
    found = setting.ask("prune", "--namespace", f"{tag:016x}", "--model", "11", "--yes", *where)
    assert found["deleted"] == len(ours)
    assert setting.held() == {*nobodys, *other, calibration}
    assert setting.ask("prune", "--all", "--yes", *where)["deleted"] == len(nobodys) + len(other)
    assert setting.held() == {calibration}
    assert setting.ask("prune", "--all", "--calibrations", "--yes", *where)["deleted"] == 1
    assert setting.held() == set()


def test_what_was_stored_long_ago_goes(setting: Setting) -> None:
    old = setting.prompt(tokens(300))
    time.sleep(2.1)
    new = setting.prompt(tokens(300, 4))
    assert setting.ask("prune", "--older-than", "2s", "--yes", *setting.places())["deleted"] == len(
        old
    )
    assert setting.held() == set(new)


def test_nothing_goes_without_a_filter_or_a_yes(setting: Setting) -> None:
    made = setting.prompt(tokens(300))
    for given, says in (
        (["prune"], "filter"),
        (["prune", "--all"], "--yes"),
        (["prune", "--model", "xyz", "--yes"], "--model"),
        (["prune", "--older-than", "soon", "--yes"], "--older-than"),
        (["prune", "--with-prefix", "--yes"], "--with-prefix"),
        (["prune", "--text", "a", "--tokens", "b", "--yes"], "one of the two"),
        (["prune", "--text", "a", "--all", "--yes"], "without other filters"),
    ):
        with pytest.raises(ConfigError, match=says):
            setting.run(*given, *setting.places())
    assert setting.held() == set(made)
    shown = setting.run("prune", "--all", "--dry-run", *setting.places())
    assert "3 blobs" in shown
    assert "would be deleted" in shown


def test_a_pinned_prompt_is_listed_until_its_lease_ends(setting: Setting) -> None:
    ours = tokens(700)
    made = setting.prompt(ours, calibration=CALIBRATION)
    calibration = setting.put("calibration", CALIBRATION, b"", (0, 0))
    other = setting.prompt(tokens(700, 8))
    given = ["pin", setting.file(ours), "--model", MODEL.hex(), "--ttl", "2h", *setting.places()]
    pinned = setting.ask(*given)
    assert pinned["blobs"] == len(made) + 1
    (lease,) = pinned["leases"]
    assert abs(pinned["until_unix_s"] - time.time() - 7200) < 30
    stat = setting.client.stat()
    assert stat.pinned == len({*made, calibration})
    (told,) = stat.leases
    assert (told.lease_id, told.blobs, told.token_end) == (lease, len(made) + 1, 700)
    shown = setting.run(
        "status", "--store", setting.store, "--socket", str(setting.socket),
        "--coordinator", setting.coordinator,
    )  # fmt: skip
    assert lease[:20] in shown.replace("\n", "").replace("│", "").replace(" ", "")
    setting.ask("unpin", lease, "--store", setting.store)
    assert setting.client.stat().pinned == 0
    assert setting.ask("unpin", lease, "--store", setting.store, code=1) == {
        "lease": lease, "existed": False
    }  # fmt: skip
    assert setting.held() == {*made, calibration, *other}


def test_pages_are_pinned_by_a_key_alone(setting: Setting) -> None:
    made = setting.prompt(tokens(900))
    pages = [key for key in made if key.kind == "page"]
    found = setting.ask("pin", "--page-key", pages[1].page_key.hex(), "--store", setting.store)
    assert found["blobs"] == 2
    none = setting.ask("pin", "--page-key", "ab" * 32, "--store", setting.store, code=1)
    assert none["leases"] == []
    for given in (["pin"], ["pin", "--page-key", "ab"], ["pin", "x", "--page-key", "ab" * 32]):
        with pytest.raises(ConfigError):
            setting.run(*given, "--store", setting.store)
    with pytest.raises(ConfigError, match="30d"):
        setting.run("pin", "--page-key", "ab" * 32, "--ttl", "31d", "--store", setting.store)


def test_a_quota_is_set_by_name_and_holds(setting: Setting) -> None:
    tag = namespace_tag(setting.salt)
    where = ["--store", setting.store, "--coordinator", setting.coordinator]
    setting.prompt(tokens(300), namespace=tag, size=50_000)
    theirs = setting.prompt(tokens(300, 6), namespace=5, size=50_000)
    told = setting.ask("quota", "set", "default", "250kB", *where)
    assert (told["tag"], told["quota_bytes"], told["evicted"]) == (f"{tag:016x}", 250_000, 0)
    for seed in range(20, 24):
        setting.prompt(tokens(300, seed), namespace=tag, size=50_000)
    shown_rows = setting.ask("quota", "show", *where)["namespaces"]
    rows = {row["namespace"] or row["tag"]: row for row in shown_rows}
    assert 0 < rows["default"]["bytes"] <= 250_000
    assert rows["default"]["counters"]["evicted"] > 0
    assert rows[f"{5:016x}"]["blobs"] == 3
    assert set(theirs) <= setting.held()
    shown = setting.run("quota", "show", *where)
    assert "default" in shown
    assert "0.238 MiB" in shown
    assert setting.ask("quota", "set", f"{tag:016x}", "none", *where)["quota_bytes"] == 0
    for name, size, says in (("nobody", "1GB", "one of default"), ("default", "much", "BYTES")):
        with pytest.raises(ConfigError, match=says):
            setting.run("quota", "set", name, size, *where)
