"""`kvferry doctor`: what is well is said so, what is not has a remedy and exit code 1."""

import json
import signal
import socket as sockets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_llama import save_model, sharp_llama
from typer.testing import CliRunner

import kvferry
from kvferry.cli import doctor as command
from kvferry.cli.demo.cluster import Cluster
from kvferry.cli.doctor import machine, services, software
from kvferry.cli.doctor.finding import Finding, run_checks
from kvferry.codec.mlx import openblas
from kvferry.node.client import NodeClient
from kvferry.node.hooks import contracts
from kvferry.settings import NodeSettings, StoreSettings

Lines = dict[str, Any]


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    command.register(app)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def report(*arguments: str) -> tuple[int, Lines]:
    """Exit code, and name -> its worst line."""
    status, out = run(*arguments, "--json", "-")
    found = json.loads(out)
    order = ("ok", "warn", "fail")
    lines: Lines = {}
    for line in sorted(found["checks"], key=lambda line: order.index(line["state"])):
        assert line["text"]
        assert line["state"] == "ok" or line["remedy"] or line["name"].startswith("mlx")
        lines[line["name"]] = line
    assert status == (1 if found["fail"] else 0)
    return status, lines


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing runs and nothing was ever stored."""
    for kind in ("CACHE", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    for name in ("STORE", "COORDINATOR"):
        monkeypatch.setenv(f"KVFERRY_NODE_{name}", "127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cluster(alone: Path) -> Iterator[Cluster]:
    made = Cluster(alone, nodes=1)
    made.set_policy("default")
    with made:
        joined(made)
        yield made


def joined(cluster: Cluster) -> None:
    """Until the node has registered: a daemon is ready before, and what it lacks is told."""
    end = time.monotonic() + 60
    with NodeClient(cluster.sockets[0]) as client:
        while not (client.hello().namespace_salt and client.status().store_reachable):
            assert time.monotonic() < end, client.status()
            time.sleep(0.05)


def address(cluster: Cluster, name: str) -> str:
    found: str = cluster.service(name).wait_ready()["address"]
    return found


def at(cluster: Cluster) -> list[str]:
    return [
        "--socket", str(cluster.sockets[0]), "--store", address(cluster, "store"),
        "--coordinator", address(cluster, "coordinator"),
    ]  # fmt: skip


@pytest.mark.processes
def test_a_machine_that_is_well(cluster: Cluster) -> None:
    status, lines = report(*at(cluster))
    assert status == 0
    for name in ("python", "mlx", "mlx-lm's server", "node", "store", "coordinator", "socket"):
        assert lines[name]["state"] == "ok", lines[name]
    assert "machine-0" in lines["coordinator"]["text"]
    assert not [name for name in lines if name.endswith(("clock", "release"))]
    assert lines["calibrations"]["state"] == "warn"
    assert "kvferry calibrate" in lines["calibrations"]["remedy"]
    status, screen = run(*at(cluster))
    assert status == 0
    assert "0 failing" in screen


@pytest.mark.processes
def test_each_service_that_is_down_is_named_with_its_remedy(cluster: Cluster) -> None:
    where = at(cluster)
    cluster.service("store").process.send_signal(signal.SIGKILL)
    cluster.service("store").process.wait()
    status, lines = report(*where)
    assert status == 1
    assert lines["store"]["state"] == lines["node's store"]["state"] == "fail"
    assert "kvferry store" in lines["store"]["remedy"]
    assert lines["node"]["state"] == "ok"
    cluster.service("node0").process.send_signal(signal.SIGSTOP)
    try:
        _, lines = report(*where)
    finally:
        cluster.service("node0").process.send_signal(signal.SIGCONT)
    assert lines["node"]["state"] == "fail"
    assert "does not answer" in lines["node"]["text"]


@pytest.mark.processes
def test_other_releases_are_noted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "__version__", "9.9.9")
    status, lines = report(*at(cluster))
    assert status == 0
    for name in ("node", "store", "coordinator"):
        assert kvferry.__version__ in lines[f"{name}'s release"]["text"]
    assert "machine-0's release" in lines


@pytest.mark.parametrize(
    ("theirs", "says"), [(1000.5, ""), (0.0, ""), (1100.0, "99 s ahead"), (900.0, "100 s behind")]
)
def test_other_clocks_are_noted(theirs: float, says: str) -> None:
    found = list(services.clock("store", theirs, asked=1000.0, heard=1001.0))
    assert [line.text.startswith(says) for line in found] == [True] * bool(says)


def test_a_machine_where_nothing_runs(alone: Path) -> None:
    status, lines = report()
    assert status == 1
    for name in ("node", "store", "coordinator"):
        assert lines[name]["state"] == "fail"
    assert "kvferry up" in lines["node"]["remedy"]


def test_a_server_of_something_else_is_no_store(alone: Path) -> None:
    with sockets.socket() as other:
        other.bind(("127.0.0.1", 0))  # bound, and nobody listens
        _, lines = report("--store", f"127.0.0.1:{other.getsockname()[1]}")
    assert lines["store"]["state"] == "fail"


def test_settings_that_cannot_hold_are_a_line_and_not_the_end(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFERRY_STORE_BUDGET_BYTES", "lots")
    status, lines = report()
    assert status == 1
    assert "budget_bytes" in lines["settings"]["text"]
    assert lines["python"]["state"] == "ok"


def test_addresses_beyond_loopback(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_NODE_LISTEN", "0.0.0.0:7801")
    assert report()[1]["exposure"]["state"] == "fail"
    monkeypatch.setenv("KVFERRY_NODE_ALLOW_REMOTE_PLAINTEXT", "true")
    line = report()[1]["exposure"]
    assert (line["state"], "node.listen" in line["text"]) == ("warn", True)


def test_several_coordinators_and_their_etcd(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = "127.0.0.1:1,localhost:2"
    monkeypatch.setenv("KVFERRY_NODE_COORDINATOR", here)
    monkeypatch.setenv("KVFERRY_COORDINATOR_ETCD", "http://127.0.0.1:2379,https://etcd.lan:2379")
    assert report()[1]["exposure"]["state"] == "ok"
    monkeypatch.setenv("KVFERRY_COORDINATOR_ETCD", "http://127.0.0.1:2379,http://etcd.lan:2379")
    line = report()[1]["exposure"]
    assert line["state"] == "warn"
    assert "etcd (etcd.lan:2379) unencrypted" in line["text"]
    monkeypatch.delenv("KVFERRY_COORDINATOR_ETCD")
    monkeypatch.setenv("KVFERRY_NODE_COORDINATOR", f"{here},mini.lan:7802")
    line = report()[1]["exposure"]
    assert "caches go to mini.lan:7802 unencrypted" in line["text"]


def only(found: Iterator[Finding], name: str) -> Finding:
    (line,) = [line for line in found if line.name == name]
    return line


def node(folder: Path, **more: Any) -> NodeSettings:
    return NodeSettings.load(data_dir=folder / "node", socket=folder / "n.sock", **more)


def test_folders_and_their_room(alone: Path) -> None:
    store = StoreSettings.load(backend=f"file://{alone / 'store'}", budget_bytes=1 << 20)
    small = {"disk_bytes": 1 << 20, "disk_reserve_bytes": 0}
    fine = only(machine.folders(node(alone, **small), store), "node's folder")
    assert fine.state == "ok"
    huge = node(alone, disk_bytes=1 << 60, disk_reserve_bytes=0)
    assert only(machine.folders(huge, store), "node's folder").state == "warn"
    kept = node(alone, disk_bytes=1 << 20, disk_reserve_bytes=1 << 60)
    full = only(machine.folders(kept, store), "node's folder")
    assert (full.state, "reserve" in full.text) == ("fail", True)
    (alone / "node").write_text("a file in its place")
    barred = only(machine.folders(node(alone, **small), store), "node's folder")
    assert (barred.state, "cannot be written" in barred.text) == ("fail", True)
    (alone / "node").unlink()
    (alone / "node").mkdir(mode=0o755)
    seen = list(machine.folders(node(alone, **small), store))
    assert any("read by others" in line.text for line in seen)
    assert not (alone / "store").exists()  # nothing is made


def test_sockets(alone: Path) -> None:
    settings = node(alone)
    assert not list(machine.socket(settings))
    settings.socket.write_text("no socket")
    assert only(machine.socket(settings), "socket").state == "fail"
    settings.socket.unlink()
    with sockets.socket(sockets.AF_UNIX) as server:
        server.bind(str(settings.socket))
        settings.socket.chmod(0o600)
        assert only(machine.socket(settings), "socket").state == "ok"
        settings.socket.chmod(0o666)
        assert only(machine.socket(settings), "socket").state == "warn"
    long = NodeSettings.load(socket=alone / ("x" * 120) / "n.sock")
    assert only(machine.socket(long), "socket").state == "fail"


def test_memory(alone: Path) -> None:
    assert only(machine.memory(node(alone)), "memory").text.endswith("free")
    assert only(machine.memory(node(alone, memory_bytes=1 << 50)), "memory").state == "warn"


def test_software_that_has_changed(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise ImportError("no module named 'mlx_lm.server'")

    checks: dict[str, tuple[object, str, Callable[..., object], str]] = {
        "mlx-lm's server": (contracts, "server_contract", missing, "fail"),
        "exo": (contracts, "exo_contract", lambda: "KVPrefixCache is not there", "fail"),
        "openblas": (openblas, "find_openblas", lambda: None, "warn"),
    }
    for name, (place, function, instead, state) in checks.items():
        monkeypatch.setattr(place, function, instead)
        if name != "openblas" or openblas.sys.platform.startswith("linux"):
            line = report()[1][name]
            assert line["state"] == state
            assert line["remedy"]


def test_a_model_and_its_calibration(alone: Path) -> None:
    folder = alone / "model"
    folder.mkdir()
    save_model(*sharp_llama(27), folder)
    _, lines = report("--model", str(folder))
    assert "3 layers" in lines["model"]["text"]
    assert lines["calibration"]["state"] == "warn"
    assert f"--model {folder}" in lines["calibration"]["remedy"]
    (folder / "config.json").unlink()
    assert report("--model", str(folder))[1]["model"]["state"] == "fail"


def test_a_check_that_breaks_down_is_not_the_end() -> None:
    def broken() -> Iterator[Finding]:
        raise ZeroDivisionError("oh")
        yield

    def fine() -> Iterator[Finding]:
        yield Finding("b", "ok", "well")

    found = list(run_checks([("a", broken), ("b", fine)]))
    assert [(line.name, line.state) for line in found] == [("a", "fail"), ("b", "ok")]
    assert "oh" in found[0].text


def test_a_machine_without_mlx_may_be_a_store(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "has_mlx", lambda: False)
    monkeypatch.setattr(services, "has_mlx", lambda: False)
    _, lines = report()
    assert lines["mlx"]["state"] == lines["node"]["state"] == "warn"
    assert "kvferry[mlx]" in lines["mlx"]["remedy"]
    assert not {"mlx-lm", "openblas", "exo", "calibrations"} & set(lines)
