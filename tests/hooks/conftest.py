"""A small model in a folder of its own, and a cluster of one node."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_llama import save_model, sharp_llama

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel, load_model

VOCABULARY = 64


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """See `sharp_llama`; in a folder of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    save_model(*sharp_llama(VOCABULARY), folder)
    return load_model(str(folder))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """`tiny` with wider heads, so that its caches can be quantized."""
    folder = tmp_path_factory.mktemp("wide")
    save_model(*sharp_llama(VOCABULARY, head_dim=32), folder)
    return load_model(str(folder))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, nodes=1)
    cluster.set_policy("high_compression")
    with cluster:
        yield cluster
