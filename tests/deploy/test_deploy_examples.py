"""The example files are read by the code that reads them in earnest; the README is true."""

import re
import tomllib
from pathlib import Path

import pytest

from kvferry.cluster.policy import check_policy, layer_rules, load_policy
from kvferry.settings import (
    CoordinatorSettings,
    NodeSettings,
    ServiceSettings,
    StoreSettings,
)
from kvferry.settings_sources import SECURITY

DEPLOY = Path(__file__).parents[2] / "deploy"
SETTINGS = (StoreSettings, CoordinatorSettings, NodeSettings)


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.table)
def test_the_example_settings_load(
    kind: type[ServiceSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFERRY_CONFIG", str(DEPLOY / "kvferry.toml"))
    settings = kind.load()
    table = tomllib.loads((DEPLOY / "kvferry.toml").read_text())[kind.table]
    assert table
    for name, value in table.items():
        assert getattr(settings, name) == value
    assert not settings.allow_remote_plaintext


def test_the_example_names_every_setting_with_its_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (DEPLOY / "kvferry.toml").read_text()
    tables = re.split(r"(?m)^\[(\w+)\]$", text)[1:]
    shown = dict(zip(tables[::2], tables[1::2], strict=True))
    assert set(shown) == {"security", *(kind.table for kind in SETTINGS)}
    assert set(re.findall(r"(?m)^(?:# )?(\w+) = ", shown["security"])) == set(SECURITY)
    for kind in SETTINGS:
        named = set(re.findall(r"(?m)^(?:# )?(\w+) = ", shown[kind.table]))
        assert named == set(kind.model_fields) - set(SECURITY), kind.table
        # What stands there commented out is right too, once it is not commented out.
        lines = re.findall(r"(?m)^# (\w+ = .*)$", shown[kind.table])
        for line in lines:
            path = tmp_path / "one.toml"
            path.write_text(f"[{kind.table}]\n{line}\n")
            monkeypatch.setenv("KVFERRY_CONFIG", str(path))
            kind.load()


def test_the_example_policy_holds() -> None:
    policy = load_policy(DEPLOY / "policy.toml")
    check_policy(policy)
    runs = layer_rules(policy, bytes(32), (0, 30))
    assert [(span, rule.codec) for span, rule in runs] == [((0, 2), "affine"), ((2, 30), "ferry")]


def test_the_readme_names_every_file_and_no_other() -> None:
    text = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(DEPLOY).parts)
        generated = {"run", "state"} & set(path.relative_to(DEPLOY).parts)
        if path.is_file() and path.suffix in (".service", ".plist", ".toml") and not hidden:
            assert generated or path.name in text, path.name
    for named in re.findall(r"deploy/[\w./@-]+\.(?:service|plist|toml|yaml)", text):
        assert (DEPLOY.parent / named).is_file(), named
