"""Fixtures shared by all parts: folders of one's own, the real model, a calibration."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from kvferry.cli.demo.cluster import Cluster


# How long an example takes is a matter of the machine, and of what else runs there.
settings.register_profile("kvferry", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvferry")

LATER = ("long", "faults", "ceph", "hf")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What carries a marker of `LATER` runs where it is asked for: ``pytest -m long``."""
    asked = config.option.markexpr
    left = [item for item in items if _later(item, asked)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def _later(item: pytest.Item, asked: str) -> bool:
    markers = [name for name in LATER if item.get_closest_marker(name)]
    return bool(markers) and not any(name in asked for name in markers)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own configuration, cache or state."""
    base = tmp_path_factory.mktemp("home")
    names = ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR")
    kept = {name: os.environ.get(name) for name in (*names, "KVFERRY_CONFIG")}
    os.environ.pop("KVFERRY_CONFIG", None)
    for name in names:
        folder = base / name.lower()
        folder.mkdir()
        os.environ[name] = str(folder)
    yield
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def calibrated(_own_folders: None) -> Path:
    """The cache folder after a small calibration of SmolLM2, made once a session."""
    from kvferry.codec.mlx.openblas import model_environment
    from kvferry.places import user_dir

    command = [sys.executable, "-m", "kvferry", "calibrate", "--model", "smollm2"]
    subprocess.run(
        [*command, "--tokens", "4096", "--if-missing"],
        env=dict(os.environ) | model_environment(),
        check=True,
        timeout=560,
    )
    return user_dir("cache")


@pytest.fixture(scope="module")
def exact_cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Cluster"]:
    """Store, coordinator and the module's ``NODES`` daemons (1), under the policy ``exact``."""
    from kvferry.cli.demo.cluster import Cluster

    nodes = getattr(request.module, "NODES", 1)
    cluster = Cluster(tmp_path_factory.mktemp("exact"), nodes=nodes)
    cluster.set_policy("exact")
    with cluster:
        yield cluster
