"""`kvferry certs` as its user meets it, and what the other commands do with what it made."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvferry.cli import certs as command
from kvferry.cli import doctor
from kvferry.cluster.certificate import make_leaf
from kvferry.cluster.credentials import Credentials
from kvferry.cluster.tokens import load_entries
from kvferry.errors import ConfigError, FerryError
from kvferry.settings import CoordinatorSettings, NodeSettings, StoreSettings


def certs(*arguments: str) -> str:
    app = typer.Typer()
    command.register(app)
    result = CliRunner().invoke(app, ["certs", *arguments])
    if isinstance(result.exception, FerryError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*arguments: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(certs(*arguments, "--json", "-"))
    return value


@pytest.fixture
def ca(tmp_path: Path) -> list[str]:
    option = ["--ca", str(tmp_path / "ca")]
    certs("init", *option)
    return option


def test_from_nothing_to_a_machine_that_may_leave_loopback(ca: list[str], tmp_path: Path) -> None:
    out = certs("issue", "studio", "--host", "192.168.1.20", *ca)
    bundle = tmp_path / "ca" / "machines" / "studio"
    assert str(bundle) in out
    assert "tls_dir" in out
    shown = Credentials.of(StoreSettings.load(tls_dir=bundle))
    assert shown.missing() == []
    assert shown.token
    listed = told("show", *ca)
    names = {line["name"]: line for line in listed["certificates"]}
    assert set(names) == {"(the authority)", "studio"}
    assert "192.168.1.20" in names["studio"]["hosts"]
    assert not names["studio"]["renew"]
    assert {(t["label"], t["right"]) for t in listed["tokens"]} == {
        ("admin", "admin"),
        ("nodes", "write"),
    }
    assert "studio" in certs("show", *ca)
    assert told("show", str(bundle))["certificates"][0]["name"] == "studio"


def test_tokens_are_made_shown_once_and_revoked(ca: list[str], tmp_path: Path) -> None:
    made = told("token", "guests", "--read-only", "--label", "a laptop", *ca)
    assert made["token"].startswith("kvf_")
    assert made["right"] == "read"
    everything = json.dumps(told("show", *ca)) + certs("show", *ca)
    assert made["token"] not in everything
    out = tmp_path / "admin.token"
    assert made["token"] not in certs("token", "guests", "--admin", "--out", str(out), *ca)
    assert out.stat().st_mode & 0o077 == 0
    line = next(t for t in told("show", *ca)["tokens"] if t["label"] == "a laptop")
    assert told("revoke", line["hash"], *ca) == {"revoked": 1}
    with pytest.raises(ConfigError):
        certs("revoke", line["hash"], *ca)
    with pytest.raises(ConfigError):
        certs("revoke", "abc", *ca)
    with pytest.raises(ConfigError, match="one of the two"):
        certs("token", "guests", "--admin", "--read-only", *ca)


def test_a_namespaces_tokens_are_bound_to_its_tag(ca: list[str], tmp_path: Path) -> None:
    tag = "00000000000000ab"
    certs("issue", "guest", "--namespace", "guests", *ca)
    assert told("bind", "guests", "--tag", tag, *ca)["tokens"] == 1
    certs("token", "guests", "--read-only", *ca)
    listed = {(t["namespace"], t["writes_tag"]) for t in told("show", *ca)["tokens"]}
    assert listed == {("default", ""), ("guests", tag)}
    copied = load_entries(tmp_path / "ca" / "machines" / "guest" / "tokens.json")
    assert {entry.bearer.tag for entry in copied} == {0, 0xAB}
    out = certs("bind", "guests", "--tag", "none", *ca)
    assert "bound no more" in out
    assert {t["writes_tag"] for t in told("show", *ca)["tokens"]} == {""}
    with pytest.raises(ConfigError, match="--coordinator"):
        certs("bind", "guests", "--coordinator", "", *ca)


def test_mistakes_are_told_in_one_line(ca: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never overwritten"):
        certs("init", *ca)
    with pytest.raises(ConfigError, match="kvferry certs init"):
        certs("issue", "x", "--ca", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="without a port"):
        certs("issue", "x", "--host", "studio:7800", *ca)
    (tmp_path / "ca" / "ca.key").write_text("damaged")
    with pytest.raises(ConfigError, match="whole"):
        certs("issue", "x", *ca)


def test_one_table_serves_all_services_and_commands(
    ca: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = told("issue", "studio", *ca)["folder"]
    config = tmp_path / "kvferry.toml"
    config.write_text(f'[security]\ntls_dir = "{bundle}"\n')
    monkeypatch.setenv("KVFERRY_CONFIG", str(config))
    for kind in (NodeSettings, StoreSettings, CoordinatorSettings):
        assert kind.load().tls_dir == Path(bundle)
    config.write_text(f'[security]\ntls_dir = "/nowhere"\n[store]\ntls_dir = "{bundle}"\n')
    assert StoreSettings.load().tls_dir == Path(bundle)
    monkeypatch.setenv("KVFERRY_SECURITY_TLS_DIR", "/elsewhere")
    assert NodeSettings.load().tls_dir == Path("/elsewhere")
    config.write_text('[security]\nlisten = "127.0.0.1:1"\n')
    with pytest.raises(ConfigError, match="tls_dir"):
        NodeSettings.load()


def lines(name: str) -> list[dict[str, str]]:
    app = typer.Typer()
    doctor.register(app)
    result = CliRunner().invoke(app, ["--json", "-"])
    checks: list[dict[str, str]] = json.loads(result.stdout)["checks"]
    return [line for line in checks if line["name"] == name]


def test_the_doctor_looks_at_certificates(
    ca: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STORE", "COORDINATOR"):
        monkeypatch.setenv(f"KVFERRY_NODE_{name}", "127.0.0.1:1")
    assert lines("certificate") == []
    bundle = Path(told("issue", "studio", *ca)["folder"])
    monkeypatch.setenv("KVFERRY_SECURITY_TLS_DIR", str(bundle))
    monkeypatch.setenv("KVFERRY_STORE_LISTEN", "192.0.2.1:7800")
    (line,) = lines("certificate")
    assert line["state"] == "ok"
    assert "days left" in line["text"]
    (line,) = lines("exposure")
    assert line["state"] == "ok"
    assert "store.listen" in line["text"]
    (bundle / "tokens.json").unlink()
    assert lines("exposure")[0]["state"] == "fail"
    (bundle / "token").unlink()
    assert lines("token")[0]["state"] == "warn"
    # Issued long ago, so that most of its life is over.
    authority = tmp_path / "ca"
    pem = [(authority / name).read_bytes() for name in ("ca.key", "ca.pem")]
    begin = datetime.now(UTC) - timedelta(days=80)
    key, cert = make_leaf(pem[0], pem[1], "studio", ["127.0.0.1"], 90.0, begin)
    (bundle / "key.pem").write_bytes(key)
    (bundle / "cert.pem").write_bytes(cert)
    (line,) = lines("certificate")
    assert line["state"] == "warn"
    assert "kvferry certs issue" in line["remedy"]
    (bundle / "key.pem").unlink()
    (line,) = lines("certificate")
    assert line["state"] == "fail"


@pytest.mark.processes
def test_a_service_that_would_be_open_to_all_does_not_start(tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvferry", "store", "--listen", "0.0.0.0:0"),
            *("--metrics-listen", "", "--backend", f"file://{folder}"),
        ],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert "no TLS" in said
    assert "no tokens" in said
    assert "kvferry certs init" in said
