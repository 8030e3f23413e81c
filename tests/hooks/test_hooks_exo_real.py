"""The hook in real exo, where there is one.

KVFERRY_EXO_PYTHON names a Python that can import exo's engine and kvferry: exo's source and
its fork of mlx-lm on PYTHONPATH, say. exo's Rust parts are not needed.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_zoo import save_model, tokens_of

from kvferry.cli.demo.cluster import Cluster

PYTHON = os.environ.get("KVFERRY_EXO_PYTHON", "")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not PYTHON, reason="KVFERRY_EXO_PYTHON names no Python with exo in it"),
]


@pytest.fixture(scope="module")
def cluster(exact_cluster: Cluster) -> Cluster:
    return exact_cluster


def runner(folder: Path, cluster: Cluster, cache_dir: Path, prompt: list[int]) -> dict[str, Any]:
    script = Path(__file__).parent / "exo_real.py"
    command = [PYTHON, str(script), str(folder), str(cluster.sockets[0]), str(cache_dir)]
    done = subprocess.run(
        [*command, *map(str, prompt)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not answer["problem"]
    return answer


@pytest.mark.parametrize("name", ["llama", "glm4_moe_lite", "lfm2", "gpt_oss", "qwen3_next"])
def test_what_one_runner_of_exo_has_seen_another_restores(
    name: str, cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    save_model(name, folder)
    prompt = tokens_of(600)
    first = runner(folder, cluster, tmp_path / "a", prompt)
    assert first["hit"] == 0
    assert first["length"] == len(prompt)  # two of them fed after what was kept
    second = runner(folder, cluster, tmp_path / "b", prompt)
    assert second["hit"] == len(prompt) - 2
    np.testing.assert_allclose(second["logits"], first["logits"], atol=1e-5)
