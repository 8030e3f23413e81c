"""Servers that several modules of this folder share."""

import pytest
from s3_servers import ceph, moto

__all__ = ["ceph", "moto"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked ``ceph`` runs where it is asked for: ``pytest -m ceph``."""
    if "ceph" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("ceph")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
