"""Tests of `kvferry.hf`: where torch is installed, and asked for (`make test-hf`)."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry.cluster.sync_client import SyncBlobStoreClient

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
sys.path.append(str(Path(__file__).parent.parent / "cluster"))  # store_process


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncBlobStoreClient]:
    """A client of a store process of its own."""
    from store_process import running

    folder = tmp_path_factory.mktemp("hf")
    with (
        running(folder / "store") as started,
        SyncBlobStoreClient(started.address) as client,
    ):
        yield client
