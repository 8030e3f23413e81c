"""A small model of its own, a process that runs it, and sites to break."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults_harness import Hook, Site, small_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """See `small_model`."""
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def hook(model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hook]:
    """One process for the tests of a module; those that kill it start it again."""
    made = Hook(model[0], tmp_path_factory.mktemp("hook"), model[1])
    yield made
    made.kill()


@pytest.fixture(scope="module", params=["exact", "default"])
def site(request: pytest.FixtureRequest, hook: Hook) -> Iterator[Site]:
    """Under either policy; one for the tests of a module."""
    with (
        tempfile.TemporaryDirectory(prefix="kvf-") as folder,
        Site(Path(folder), hook, request.param) as made,
    ):
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path, for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="kvf-") as made:
        yield Path(made)
