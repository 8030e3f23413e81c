"""``kvferry policy simulate`` as a user runs it, and the bench's figure."""

import json
import struct
import subprocess
import sys
from pathlib import Path

from kvferry.cli.cluster_bench.policy import measure
from kvferry.cli.policy_plot import draw_simulation
from kvferry.cluster.optimizer.scenario import load_scenario
from kvferry.cluster.optimizer.simulate import WAYS, play

SCENARIOS = Path(__file__).parents[2] / "deploy" / "scenarios"


def _kvferry(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvferry", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_scenario_gives_a_table_json_and_a_picture(tmp_path: Path) -> None:
    picture, report = tmp_path / "home.png", tmp_path / "home.json"
    done = _kvferry(
        "policy", "simulate", str(SCENARIOS / "home.toml"), "--plot", str(picture),
        "--json", str(report),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 machines" in done.stdout
    assert "laptop" in done.stdout
    found = json.loads(report.read_text())
    assert list(found["runs"]) == list(WAYS)
    ours, alike, prefill = (found["runs"][way] for way in WAYS)
    assert ours["restore_p50_s"] < alike["restore_p50_s"] < prefill["ttft_p50_s"]
    assert found["bits_per_value"]["optimizer"]["laptop"] < 1
    assert [change["tier"] for change in found["tiers"]] == ["high_compression", ""]
    assert picture.read_bytes().startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert width > height > 900


def test_a_bad_scenario_is_one_line_and_exit_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("colour = 1")
    for arguments, part in (
        ((str(bad),), "colour"),
        ((str(tmp_path / "none.toml"),), "No such file"),
        ((str(SCENARIOS / "home.toml"), "--plot", "x.gif"), ".png"),
    ):
        done = _kvferry("policy", "simulate", *arguments)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert part in done.stderr


def test_many_machines_are_drawn_too(tmp_path: Path) -> None:
    text = (SCENARIOS / "fleet.toml").read_text()
    text = text.replace("count = 100", "count = 8").replace(
        "requests_per_s = 20", "requests_per_s = 0.5"
    )
    (tmp_path / "fleet.toml").write_text(text)
    scenario = load_scenario(tmp_path / "fleet.toml")
    runs = [play(scenario, way) for way in WAYS]
    assert draw_simulation(scenario, runs, tmp_path / "fleet.png") > 10_000


def test_the_benchs_figure_is_of_a_decision_that_keeps_the_budget() -> None:
    found = measure(nodes=5, groups=7, repeats=2)
    assert found["policy_parts"] == 35
    assert 0 < found["policy_ms"] <= found["policy_worst_ms"]
