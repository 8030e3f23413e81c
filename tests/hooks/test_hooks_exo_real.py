"""The hook in real exo, where there is one, on one machine; `test_hooks_exo_ranks`: on several.

KVFERRY_EXO_PYTHON names a Python that can import exo's engine and kvferry: exo's source and
its fork of mlx-lm on PYTHONPATH, say. exo's Rust parts are not needed.
"""

from pathlib import Path

import pytest
from exo_group import PYTHON, Split, run_exo
from model_zoo import save_model, tokens_of

from kvferry.cli.demo.cluster import Cluster

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not PYTHON, reason="KVFERRY_EXO_PYTHON names no Python with exo in it"),
]
ALONE = Split(((0, 4),))


@pytest.fixture(scope="module")
def cluster(exact_cluster: Cluster) -> Cluster:
    return exact_cluster


@pytest.mark.parametrize("name", ["llama", "glm4_moe_lite", "lfm2", "gpt_oss", "qwen3_next"])
def test_what_one_runner_of_exo_has_seen_another_restores(
    name: str, cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    save_model(name, folder)
    request = {"prompt": tokens_of(600)}
    # Asked twice: exo's own entry serves the second time, as far as exo can.
    [rank] = run_exo(ALONE, folder, cluster, tmp_path / "a", [request, request])
    first, again = rank["answers"]
    assert first["hit"] == 0
    assert again["hit"] > 0
    [rank] = run_exo(ALONE, folder, cluster, tmp_path / "b", [request])
    second = rank["answers"][0]
    assert second["hit"] == 598
    assert second["tokens"] == first["tokens"]
    assert second["logits"] == first["logits"]
