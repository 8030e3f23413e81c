"""``kvferry policy set`` tells people what a policy costs that is easily missed."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvferry.cli import policy

KEYS = "what keys lose, every query meets"
DROPS = "never put back into a live cache"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The commands, and a coordinator that takes any policy as version 7."""
    monkeypatch.setattr(policy, "_call", lambda address, ask: 7)
    made = typer.Typer()
    policy.register(made)
    return made


def rule(codec: str, options: str = "", layers: str = "all") -> str:
    return f'[[rules]]\nlayers = "{layers}"\ncodec = "{codec}"\noptions = {{ {options} }}\n'


@pytest.mark.parametrize(
    ("rules", "warned"),
    [
        (rule("lowrank", 'target = "k"'), [f"lowrank target=k: {KEYS}"]),
        (rule("lowrank", 'target = "kv", rank = 8'), [f"lowrank target=kv: {KEYS}"]),
        (rule("lowrank", 'target = "v"'), []),
        (rule("lowrank", "rank = 8"), []),
        (rule("zstd"), []),
        # Each thing once, however many rules have it.
        (
            rule("lowrank", 'target = "kv", rank = 8', "0-2")
            + rule("lowrank", 'target = "kv"', "2-4")
            + rule("lowrank", 'target = "k"', "4-6")
            + rule("streaming", "ratio = 4"),
            [
                f"streaming drops tokens: pages stored by it are {DROPS}",
                f"lowrank target=kv: {KEYS}",
                f"lowrank target=k: {KEYS}",
            ],
        ),
    ],
)
def test_a_file_is_put_in_force_with_its_warnings(
    app: typer.Typer, tmp_path: Path, rules: str, warned: list[str]
) -> None:
    file = tmp_path / "own.toml"
    file.write_text(rules)
    done = CliRunner().invoke(app, ["policy", "set", str(file)])
    assert done.exit_code == 0
    assert done.stdout == "policy 'own' is in force as version 7\n"
    lines = done.stderr.splitlines()
    assert all(
        line.startswith(f"warning: {part}") for line, part in zip(lines, warned, strict=True)
    )
    told = json.loads(CliRunner().invoke(app, ["policy", "set", str(file), "--json", "-"]).stdout)
    assert [f"warning: {line}" for line in told["warnings"]] == lines


@pytest.mark.parametrize("name", ["exact", "default", "high_compression", "memory_emergency"])
def test_policies_that_come_with_it_need_no_warning(app: typer.Typer, name: str) -> None:
    done = CliRunner().invoke(app, ["policy", "set", name])
    assert (done.exit_code, done.stderr) == (0, "")
