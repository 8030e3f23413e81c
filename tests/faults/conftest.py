"""A small model of its own, a process that runs it, and sites to break."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults_harness import VOCABULARY, Hook


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked ``faults`` runs where it is asked for: ``pytest -m faults``."""
    if "faults" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `sharp_llama`."""
    from tiny_llama import save_model, sharp_llama

    folder = tmp_path_factory.mktemp("model")
    save_model(*sharp_llama(VOCABULARY), folder)
    return folder


@pytest.fixture(scope="module")
def hook(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hook]:
    """One process for the tests of a module; those that kill it start it again."""
    made = Hook(model, tmp_path_factory.mktemp("hook"))
    yield made
    made.kill()


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path, for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="kvf-") as made:
        yield Path(made)
