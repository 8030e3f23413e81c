"""Two real ranks over the ring backend: same answers, agreement, and no hang."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.cli.demo.cluster import Cluster
from kvferry.node.hooks.pipeline.launch import Ranks

pytestmark = [pytest.mark.model, pytest.mark.processes]

PROMPT = list(range(5000, 5700))
CUT = 12


@pytest.fixture
def cluster(tmp_path: Path, calibrated: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, nodes=2)
    cluster.set_policy("exact")
    with cluster:
        yield cluster


def ranks(cluster: Cluster, cut: int = CUT, **options: float) -> Ranks:
    layers = [(0, cut), (cut, 30)]
    return Ranks(
        [
            {"model": "smollm2", "layers": span, "socket": str(socket), "options": options}
            for span, socket in zip(layers, cluster.sockets, strict=True)
        ],
        cluster.folder,
    )


def generate(running: Ranks, **arguments: Any) -> tuple[list[int], list[int]]:
    """(tokens chosen, tokens restored on each rank); all ranks must choose alike."""
    answers = running.call("generate", tokens=PROMPT, max_tokens=6, **arguments)
    assert answers[0]["choices"] == answers[1]["choices"]
    restored = [a["restore"]["restored_tokens"] for a in answers if a["restore"]]
    return answers[0]["choices"], restored


def test_two_ranks_restore_what_they_stored_and_another_split_does_too(
    cluster: Cluster,
) -> None:
    with ranks(cluster) as running:
        running.call("policy", name="exact")
        cold, _ = generate(running, use_cache=False, offer=True)
        running.call("flush")
        again, restored = generate(running)
        assert again == cold
        assert restored == [699, 699]
    with ranks(cluster, cut=20) as running:
        running.call("policy", name="exact")
        assert generate(running) == (cold, [699, 699])


def test_a_rank_whose_daemon_died_makes_both_miss(cluster: Cluster) -> None:
    with ranks(cluster, request_timeout_s=1.0) as running:
        running.call("policy", name="exact")
        cold, _ = generate(running, use_cache=False, offer=True)
        running.call("flush")
        cluster.service("node1").process.kill()
        again, restored = generate(running)
        assert restored == [0, 0]
        assert again == cold
