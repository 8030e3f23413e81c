"""What a model's hooks stored is found by its prompt, and is its namespace's."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from test_cli_explain import KNOWN, Setting, letters
from typer.testing import CliRunner

from kvferry.cli import pin, prune, quota
from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import FerryError
from kvferry.node.client import NodeClient
from kvferry.proto.keys import namespace_tag

pytestmark = [pytest.mark.processes]

LONGER = KNOWN[:600] + letters(400, 2)  # shares two pages with `KNOWN`


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("upkeep")
    cluster = Cluster(folder, nodes=1)
    cluster.set_policy("exact")
    with pytest.MonkeyPatch.context() as patch, cluster:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        made = Setting(cluster, folder)
        made.offer(KNOWN)
        made.offer(LONGER)
        yield made


def ask(setting: Setting, *arguments: str) -> dict[str, Any]:
    app = typer.Typer()
    for module in (pin, prune, quota):
        module.register(app)
    result = CliRunner().invoke(app, [*arguments, "--json", "-"])
    if isinstance(result.exception, FerryError):
        raise result.exception
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_prompts_blobs_are_pinned_counted_and_deleted(setting: Setting) -> None:
    addresses = {
        name: json.loads((setting.folder / f"{name}.ready.json").read_text())["address"]
        for name in ("store", "coordinator")
    }
    store = ["--store", addresses["store"]]
    with NodeClient(setting.cluster.sockets[0], timeout_s=10.0) as node:
        tag = namespace_tag(node.hello().namespace_salt)
    with SyncBlobStoreClient(addresses["store"]) as client:

        def held() -> list[Any]:
            return [info for batch in client.list() for info in batch]

        assert {info.namespace_tag for info in held()} == {tag}
        shown = ask(setting, "quota", "show", *store, "--coordinator", addresses["coordinator"])
        (row,) = shown["namespaces"]
        assert (row["namespace"], row["blobs"]) == ("default", len(held()))
        prompt = setting.folder / "prompt.txt"
        prompt.write_text(KNOWN)
        about = ["--model", str(setting.model), "--socket", str(setting.cluster.sockets[0]), *store]
        mine = [i for i in held() if i.tokens[1] <= 512 or i.tokens == (512, 700)]
        assert ask(setting, "pin", str(prompt), *about)["blobs"] == len(mine)
        told = ask(setting, "prune", "--text", str(prompt), *about, "--yes")
        # Its pages are the other prompt's too: only its tail goes.
        assert set(told["kinds"]) == {"tail"}
        left = setting.explain(LONGER)
        assert left["restorable_tokens"] == len(LONGER)
        prompt.write_text(LONGER)
        told = ask(setting, "prune", "--text", str(prompt), *about, "--yes")
        assert set(told["kinds"]) == {"page", "tail"}
        assert [i for i in held() if i.key.kind != "calibration"] == []
    assert setting.explain(LONGER)["restorable_tokens"] == 0
