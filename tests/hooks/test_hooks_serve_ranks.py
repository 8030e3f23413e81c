"""The server over two ranks on loopback, as `mlx.launch` would start them."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from model_zoo import save_model
from serve_process import Server
from tiny_llama import save_model as save_llama
from tiny_llama import sharp_llama

from kvferry.cli.cluster_bench.ports import free_port, free_ports
from kvferry.cli.demo.cluster import Cluster

pytestmark = [pytest.mark.processes, pytest.mark.long]

PROMPT = "".join(chr(97 + i * i % 23) for i in range(600))


@pytest.fixture
def exact(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, nodes=1)
    cluster.set_policy("exact")
    with cluster:
        yield cluster


def save_indexed(kind: str, folder: Path) -> None:
    """With the index that pipelines look layers up in."""
    save_model(kind, folder)
    held = mx.load(str(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@contextmanager
def two_ranks(folder: Path, cluster: Cluster, model: Path, *arguments: str) -> Iterator[Server]:
    """Yields the first, which listens; both end when the first is told to."""
    hosts = folder / f"hosts-{free_port()}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    ranks = [
        Server(
            folder,
            cluster.sockets[0],
            *arguments,
            model=str(model),
            environment={"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
        )
        for rank in range(2)
    ]
    try:
        with ranks[0]:
            yield ranks[0]
        ranks[1].process.wait(60)
    finally:
        ranks[1].stop()
    assert [rank.process.returncode for rank in ranks] == [0, 0]
    counters = ranks[0].summary()
    assert not [n for n in counters if "bug" in n or "drop" in n], counters


@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_what_two_ranks_stored_they_restore_and_so_does_one(
    exact: Cluster, tmp_path: Path, split: str
) -> None:
    model = tmp_path / split
    model.mkdir()
    if split == "tensor":
        save_llama(*sharp_llama(64), model)
        arguments = []
    else:
        save_indexed("deepseek_v3", model)
        arguments = ["--pipeline"]
    with two_ranks(tmp_path, exact, model, *arguments) as server:
        cold = server.complete(PROMPT)
        local = server.complete(PROMPT + "abc")
    assert (cold.cached_tokens, local.cached_tokens) == (0, 600)
    with two_ranks(tmp_path, exact, model, *arguments) as server:
        again = server.complete(PROMPT)
        other = server.complete(PROMPT[:280] + PROMPT[:300:-1])
    assert again.text == cold.text
    assert (again.cached_tokens, other.cached_tokens) == (599, 280)
    assert server.summary()["restored_requests"] == 1
    with Server(tmp_path, exact.sockets[0], model=str(model)) as server:
        alone = server.complete(PROMPT)
    assert alone.text == cold.text
    assert alone.cached_tokens == 599


def test_a_daemon_that_dies_costs_both_ranks_their_hits_and_nothing_else(
    exact: Cluster, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_llama(*sharp_llama(64), model)
    with two_ranks(tmp_path, exact, model) as server:
        server.complete(PROMPT)
        exact.stop()
        answer = server.complete(PROMPT[::-1][:500] + PROMPT)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health") as reply:
            assert json.load(reply) == {"status": "ok"}
    assert answer.cached_tokens == 0
    assert server.summary()["miss_unavailable"] == 1
