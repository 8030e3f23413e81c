"""The real server, SmolLM2, a real node daemon and store, and the real openai client."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from serve_process import Answer, Server

from kvferry.cli.demo.cluster import Cluster

pytestmark = [pytest.mark.model, pytest.mark.processes, pytest.mark.slow]

TEXT = "\n".join(
    f"Rule {n}: members of group {n % 7} may enter room {n * 3} after signing list {n * 11}."
    for n in range(1, 28)
)
LONG = [{"role": "user", "content": f"{TEXT}\n\nWho may enter room 30?"}]
OTHER = [{"role": "user", "content": f"{TEXT}\n\nWhich list is for room 42?"}]
# Of different lengths, so that the batch has padding.
PAIR = [
    [{"role": "user", "content": f"Read this: {TEXT[:1450]}\n\nSum this up."}],
    [{"role": "user", "content": f"House rules. {TEXT[:1150]}\n\nWhat is this?"}],
]


@dataclass(frozen=True)
class Before:
    """What the first server answered, and what it wrote when it was stopped."""

    cold: Answer
    again: Answer
    pair: list[Answer]
    counters: dict[str, int]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("k"), nodes=1)
    cluster.set_policy("exact")
    with cluster:
        yield cluster


@pytest.fixture(scope="module")
def before(cluster: Cluster) -> Before:
    with Server(cluster.folder, cluster.sockets[0]) as server:
        server.warm()
        cold = server.stream(LONG)
        again = server.chat(LONG)
        with ThreadPoolExecutor(2) as threads:
            pair = list(threads.map(server.chat, PAIR))
    assert server.process.returncode == 0
    return Before(cold, again, pair, server.summary())


@pytest.fixture(scope="module")
def restarted(cluster: Cluster, before: Before) -> Iterator[Server]:
    with Server(cluster.folder, cluster.sockets[0]) as server:
        server.warm()
        yield server


def test_the_first_server_computes_once_and_stores(before: Before) -> None:
    assert before.cold.cached_tokens < 64
    assert before.again.cached_tokens == before.cold.prompt_tokens - 1
    assert before.again.text == before.cold.text
    assert before.counters["blobs_put"] > 0
    assert not [name for name in before.counters if "bug" in name or name == "drop_model"]


def test_after_a_restart_the_prefix_is_restored_and_the_answer_is_the_same(
    before: Before, restarted: Server
) -> None:
    restored = restarted.stream(LONG)
    assert restored.text == before.cold.text
    assert restored.prompt_tokens == before.cold.prompt_tokens
    assert restored.cached_tokens == before.cold.prompt_tokens - 1
    assert restored.finish_reason == before.cold.finish_reason == "length"
    cold = f"first token of {before.cold.prompt_tokens} after {before.cold.first_s:.2f} s"
    print(f"\n{cold}; with {restored.cached_tokens} restored after {restored.first_s:.2f} s")


def test_what_was_asked_at_once_comes_back_one_by_one(before: Before, restarted: Server) -> None:
    for messages, answer in zip(PAIR, before.pair, strict=True):
        restored = restarted.chat(messages)
        assert restored.cached_tokens >= 256
        assert restored.text == answer.text


def test_a_turn_after_the_restart_goes_on_where_the_last_one_ended(
    before: Before, cluster: Cluster
) -> None:
    """A server that has seen nothing gets the end of the turn, and shares pages of another."""
    turns = [
        *LONG,
        {"role": "assistant", "content": before.cold.text},
        {"role": "user", "content": "And room 33?"},
    ]
    with Server(cluster.folder, cluster.sockets[0]) as server:
        second = server.chat(turns)
        assert second.cached_tokens > before.cold.prompt_tokens
        other = server.chat(OTHER)
        assert 256 <= other.cached_tokens < other.prompt_tokens - 1


def test_without_a_daemon_one_line_says_so_and_the_server_answers(
    before: Before, tmp_path: Path
) -> None:
    with Server(tmp_path, tmp_path / "nobody.sock") as server:
        answer = server.stream(PAIR[1])
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("kvferry:")]
    assert len(lines) == 1
    assert "kvferry up" in lines[0]
    assert answer.text == before.pair[1].text
    assert answer.cached_tokens == 0
    assert server.process.returncode == 0
