"""`kvferry bench cluster`: what is chosen, what is missed, what cannot be measured."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry.cli import bench_cluster
from kvferry.cli.bench import bench_app
from kvferry.errors import ConfigError


def test_every_part_can_be_measured_by_name() -> None:
    for name in bench_cluster.PARTS:
        module = pytest.importorskip(f"kvferry.cli.cluster_bench.{name}")
        assert callable(module.measure)


def test_the_policy_is_timed_for_64_nodes(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    code = _run(["--part", "policy", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["policy_ms"] > 0
    assert found["skipped"] == {}
    # A busy machine may miss the figure: then it is named, and the exit code says so.
    assert (code == 1) == (found["missed"] == ["policy_ms"])


def test_a_part_that_cannot_be_measured_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> dict[str, object]:
        raise ConfigError("etcd", "", "installed: sudo apt install etcd-server")

    monkeypatch.setattr(bench_cluster, "run_part", missing)
    out = tmp_path / "figures.json"
    assert _run(["--part", "failover", "--json", str(out)]) == 0
    assert "apt install etcd-server" in json.loads(out.read_text())["skipped"]["failover"]


def test_an_unknown_part_is_refused() -> None:
    refused = CliRunner().invoke(bench_app, ["cluster", "--part", "coffee"]).exception
    assert isinstance(refused, ConfigError)
    assert "policy, transfer" in str(refused)


def _run(arguments: list[str]) -> int:
    return CliRunner().invoke(bench_app, ["cluster", *arguments]).exit_code
