"""Scenario files and what comes of playing them."""

from pathlib import Path

import pytest
from optimizer_samples import curve

from kvferry.cluster.optimizer.scenario import load_scenario
from kvferry.cluster.optimizer.simulate import play
from kvferry.cluster.optimizer.trace import requests_of
from kvferry.errors import ConfigError

SCENARIOS = Path(__file__).parents[2] / "deploy" / "scenarios"
MODEL = """
[model]
layers = 8
steps = [0.004, 0.002, 0.001]
[[model.groups]]
layers = "0-8"
cut = 2
width = 20000
bits_per_value = [0.2, 0.4, 0.9]
kl = [0.04, 0.012, 0.003]
"""
SLOW = """
[[machines]]
name = "near"
layers = "0-4"
bytes_per_s = 1e9
[[machines]]
name = "far"
layers = "4-8"
bytes_per_s = {speed}
"""
TRACE = "[trace]\nseconds = 300\nrequests_per_s = 0.1\nconversations = 3\n"


def scenario(folder: Path, text: str) -> Path:
    path = folder / "s.toml"
    path.write_text(text)
    return path


def test_the_optimizer_restores_sooner_within_the_budget(tmp_path: Path) -> None:
    text = "decide_every_s = 3\n" + MODEL + SLOW.format(speed=2e6) + TRACE
    loaded = load_scenario(scenario(tmp_path, text))
    ours, alike, prefill = (play(loaded, way) for way in ("optimizer", "one step", "prefill"))
    assert len(ours.served) == len(alike.served) == len(prefill.served) > 0
    assert ours.bits_per_value["far"] < alike.bits_per_value["far"]
    assert ours.bits_per_value["near"] > alike.bits_per_value["near"]
    assert ours.kl_nats <= 0.005 * 1.001
    assert ours.figures()["restore_p50_s"] < 0.95 * alike.figures()["restore_p50_s"]
    assert not alike.changes
    assert len(ours.changes) == 1  # jitter alone changes nothing more
    assert prefill.figures()["restored_share"] == 0
    again = play(loaded, "optimizer")
    assert again.served == ours.served  # the same seed, the same run


def test_events_change_links_and_tiers(tmp_path: Path) -> None:
    # Measured links are smoothed, so that it takes some looks until one has become slow.
    text = "decide_every_s = 3\n" + MODEL + SLOW.format(speed=1e9) + TRACE
    text += '[[events]]\nat_s = 100\nmachine = "far"\nbytes_per_s = 1e6\n'
    text += '[[events]]\nat_s = 200\nmachine = "near"\nmemory_used_share = 0.95\n'
    policy = "budget_nats = 0.005\n[switch]\nhigh_compression = 0.9\n"
    (tmp_path / "p.toml").write_text(
        policy + "[[rules]]\ncodec = 'ferry'\noptions = {target_kl = 0.005}\n"
    )
    run = play(load_scenario(scenario(tmp_path, 'policy = "p.toml"\n' + text)), "optimizer")
    assert [100 < at < 200 for at, _ in run.changes[:2]] == [True, False]
    assert [tier for _, tier in run.tiers] == ["high_compression"]
    assert 0.005 < run.kl_nats <= 0.02 * 1.001


def test_what_is_computed_sooner_is_neither_stored_nor_restored(tmp_path: Path) -> None:
    text = "decide_every_s = 3\n" + MODEL + SLOW.format(speed=2e3) + TRACE
    loaded = load_scenario(scenario(tmp_path, text))
    ours, alike = (play(loaded, way) for way in ("optimizer", "one step"))
    assert ours.stored_bytes < 0.5 * alike.stored_bytes
    assert ours.figures()["restored_share"] == 0
    assert len(ours.changes) == 1


def test_a_thousand_machines_and_a_calibrations_folder(tmp_path: Path) -> None:
    machines = "[[machines]]\nname = 'm'\ncount = 1000\nbytes_per_s = 1e8\n"
    text = f'decide_every_s = 1000\n[model]\ncalibration = "there"\n{machines}{TRACE}'
    seen: list[Path] = []

    def read(folder: Path) -> object:
        seen.append(folder)
        return curve()

    loaded = load_scenario(scenario(tmp_path, text), read)  # type: ignore[arg-type]
    assert seen == [tmp_path / "there"]
    assert len(loaded.machines) == 1000
    assert len(play(loaded, "optimizer").served) == len(requests_of(loaded))
    with pytest.raises(ConfigError, match="1000 machines"):
        load_scenario(scenario(tmp_path, text + machines.replace("'m'", "'n'")), read)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "field", "part"),
    [
        ("colour = 1", "colour", "known are name"),
        ("[model]\nlayers = 8", "model.steps", "list of numbers"),
        (MODEL.replace('"0-8"', '"0-7"'), "model", "cover"),
        (MODEL.replace("cut = 2", "cut = 99"), "model.groups[0].cut", "1 to 8"),
        (MODEL.replace("width = 20000", "wide = 1"), "model.groups[0].wide", "known"),
        (MODEL, "machines", "1 to 1000"),
        (MODEL + "[[machines]]\nname = 'a b'", "machines[0].name", "without spaces"),
        (MODEL + "[[machines]]\nname = 'a'", "machines[0].bytes_per_s", "given"),
        (MODEL + "[[machines]]\nbytes_per_s = 0", "machines[0].bytes_per_s", "number"),
        (MODEL + "[[machines]]\nlayers = '0-9'\nbytes_per_s = 1", "machines[0].layers", "within"),
        (MODEL + "[[machines]]\nbytes_per_s = 1\n[trace]\nspeed = 1", "trace.speed", "known"),
        (
            MODEL + "[[machines]]\nbytes_per_s = 1\n[trace]\nrequests_per_s = 1e5",
            "trace.requests_per_s",
            "in all",
        ),
        (
            MODEL + "[[machines]]\nbytes_per_s = 1\n[[events]]\nmachine = 'x'",
            "events[0].machine",
            "one of the machines",
        ),
        ("name = ", "", "TOML"),
    ],
)
def test_a_bad_scenario_is_refused_in_one_line(
    tmp_path: Path, text: str, field: str, part: str
) -> None:
    path = scenario(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_scenario(path)
    assert caught.value.name == (f"{path}: {field}" if field else str(path))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_machines_that_lack_layers_cannot_serve(tmp_path: Path) -> None:
    half = MODEL + "[[machines]]\nlayers = '0-4'\nbytes_per_s = 1e6\n" + TRACE
    with pytest.raises(ConfigError, match="all layers"):
        play(load_scenario(scenario(tmp_path, half)), "optimizer")


@pytest.mark.parametrize("name", ["home.toml", "fleet.toml"])
def test_the_shipped_scenarios_load(name: str) -> None:
    loaded = load_scenario(SCENARIOS / name)
    assert loaded.machines
    assert requests_of(loaded)
