"""A folder with a short path (Unix sockets), and machines in it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_samples import Machines


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Services of this test; stopped at its end."""
    with tempfile.TemporaryDirectory(prefix="kvf-") as folder, Machines(Path(folder)) as made:
        yield made
