"""Ranks that share every layer, and the same pages on other numbers of ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from model_zoo import save_model
from tiny_llama import save_model as save
from tiny_llama import sharp_llama

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.repository import BlobInfo, ListQuery
from kvferry.node.client import NodeClient
from kvferry.node.hooks.pipeline.launch import Ranks

pytestmark = pytest.mark.processes
NODES = 2
PROMPT = [(7 * i * i + i // 3) % 60 for i in range(700)]


@pytest.fixture(scope="module")
def cluster(exact_cluster: Cluster) -> Cluster:
    return exact_cluster


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sharp")
    save(*sharp_llama(64), folder)
    return str(folder)


def zoo(name: str, folder: Path) -> str:
    save_model(name, folder)
    return str(folder)


def running(cluster: Cluster, model: str, parts: Sequence[dict[str, Any]]) -> Ranks:
    """``parts``: what tells the ranks apart; two of them, or one."""
    return Ranks(
        [
            {
                "model": model,
                "socket": str(cluster.sockets[i % 2]),
                "cache_dir": str(cluster.folder / f"cache{i}"),
                **part,
            }
            for i, part in enumerate(parts)
        ],
        cluster.folder,
    )


TENSOR = {"tensor": True}


def generate(
    ranks: Ranks, prompt: Sequence[int] = PROMPT, **arguments: Any
) -> tuple[list[int], list[int]]:
    answers = ranks.call("generate", tokens=list(prompt), max_tokens=6, **arguments)
    assert all(a["choices"] == answers[0]["choices"] for a in answers)
    return answers[0]["choices"], [a["restore"]["restored_tokens"] for a in answers if a["restore"]]


def store(ranks: Ranks) -> tuple[list[int], list[dict[str, int]]]:
    ranks.call("policy", name="exact")
    choices, _ = generate(ranks, use_cache=False, offer=True)
    return choices, [answer["counters"] for answer in ranks.call("flush")]


def stored(cluster: Cluster, kind: str) -> list[BlobInfo]:
    with NodeClient(cluster.sockets[0]) as client:
        return list(client.list(ListQuery(kind=kind)))


def test_heads_of_two_ranks_restore_on_any_number(cluster: Cluster, tiny: str) -> None:
    with running(cluster, tiny, [TENSOR] * 2) as ranks:
        cold, _ = store(ranks)
        assert generate(ranks) == (cold, [699, 699])
    assert {info.heads for info in stored(cluster, "page")} == {(0, 1), (1, 2)}
    for parts in (
        [TENSOR],
        [{"layers": (0, 1)}, {"layers": (1, 3)}],
        [{"layers": (0, 1)}, {"layers": (1, 2)}, {"layers": (2, 3)}],
    ):
        with running(cluster, tiny, parts) as ranks:
            ranks.call("policy", name="exact")
            assert generate(ranks) == (cold, [699] * len(parts))


def test_a_pipelines_pages_restore_on_tensor_ranks(cluster: Cluster, tmp_path: Path) -> None:
    model = zoo("llama", tmp_path)
    with running(cluster, model, [{"layers": (0, 3)}, {"layers": (3, 4)}]) as ranks:
        cold, _ = store(ranks)
    with running(cluster, model, [TENSOR] * 2) as ranks:
        ranks.call("policy", name="exact")
        assert generate(ranks) == (cold, [699, 699])


def test_latents_are_on_all_ranks_and_stored_once(cluster: Cluster, tmp_path: Path) -> None:
    model = zoo("deepseek_v3", tmp_path)
    with running(cluster, model, [TENSOR] * 2) as ranks:
        cold, counters = store(ranks)
        assert counters[0]["blobs_put"] > 0
        assert "blobs_put" not in counters[1]
        assert generate(ranks) == (cold, [699, 699])
    with running(cluster, model, [TENSOR]) as ranks:
        ranks.call("policy", name="exact")
        assert generate(ranks) == (cold, [699])


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5"])
def test_states_are_divided_and_come_back_to_any_number_of_ranks(
    cluster: Cluster, tmp_path: Path, name: str
) -> None:
    """Rings, and recurrent state of which each rank has some of three pieces."""
    model = zoo(name, tmp_path)

    def keep(ranks: Ranks, tokens: int) -> None:
        generate(ranks, PROMPT[:tokens], use_cache=False, offer=True)
        ranks.call("flush")

    with running(cluster, model, [TENSOR] * 2) as ranks:
        ranks.call("policy", name="exact")
        cold, _ = generate(ranks, use_cache=False)
        keep(ranks, 600)
        assert generate(ranks) == (cold, [600, 600])
    assert {info.heads for info in stored(cluster, "state")} >= {(0, 1), (1, 2)}
    with running(cluster, model, [TENSOR]) as ranks:
        ranks.call("policy", name="exact")
        assert generate(ranks) == (cold, [600])
        keep(ranks, 650)
    with running(cluster, model, [TENSOR] * 2) as ranks:
        ranks.call("policy", name="exact")
        assert generate(ranks) == (cold, [650, 650])
