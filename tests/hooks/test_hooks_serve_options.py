"""The server's own options that change its caches: quantized ones, draft models, ranks."""

from pathlib import Path

import pytest
import serve_process
from model_zoo import save_model
from serve_process import Answer, Server
from tiny_llama import save_model as save_llama
from tiny_llama import sharp_llama

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel

pytestmark = pytest.mark.processes

PROMPT = "".join(chr(97 + i * i % 23) for i in range(600))


@pytest.fixture
def exact(tmp_path: Path) -> Cluster:
    cluster = Cluster(tmp_path, nodes=1)
    cluster.set_policy("exact")
    return cluster


def said(server: Server) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if line.startswith("kvferry:")]


def healthy(server: Server) -> None:
    """What it wrote when it stopped: nothing failed, and nothing offered was dropped."""
    assert server.process.returncode == 0
    assert not [n for n in server.summary() if "bug" in n or "drop" in n], server.summary()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(not serve_process.has_argument("--kv-bits"), reason="came with mlx-lm 0.32")
def test_quantized_caches_come_back_after_a_restart(
    wide: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    quantized = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "500")
    short = PROMPT[100:400]
    with exact:
        with Server(tmp_path, exact.sockets[0], *quantized, model=wide.name) as server:
            cold, brief = server.complete(PROMPT), server.complete(short)
        healthy(server)
        with Server(tmp_path, exact.sockets[0], *quantized, model=wide.name) as server:
            again, shortly = server.complete(PROMPT), server.complete(short)
        healthy(server)
        # Short caches are not quantized, and those of every other server.
        with Server(tmp_path, exact.sockets[0], model=wide.name) as server:
            other, plainly = server.complete(PROMPT), server.complete(short)
        healthy(server)
    assert (again.cached_tokens, shortly.cached_tokens) == (599, 299)
    assert (again.text, shortly.text) == (cold.text, brief.text)
    assert (other.cached_tokens, plainly.cached_tokens) == (0, 299)
    assert plainly.text == brief.text


def test_with_a_draft_model_both_are_restored(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    """Its answers are those of the model alone, also where it goes on after its own."""
    draft = tmp_path / "draft"
    draft.mkdir()
    save_llama(*sharp_llama(64), draft)
    speculating = ("--draft-model", str(draft), "--num-draft-tokens", "2")
    with exact:
        with Server(tmp_path, exact.sockets[0], model=tiny.name) as server:
            alone = conversation(server)
        with Server(tmp_path, exact.sockets[0], *speculating, model=tiny.name) as server:
            first = conversation(server)
        healthy(server)
        assert server.summary()["draft_blobs_put"] > 0
        with Server(tmp_path, exact.sockets[0], *speculating, model=tiny.name) as server:
            again = conversation(server)
        healthy(server)
    assert [answer.text for answer in first] == [answer.text for answer in alone]
    assert [answer.text for answer in again] == [answer.text for answer in alone]
    assert again[0].cached_tokens == 599


def conversation(server: Server) -> list[Answer]:
    answers = [server.complete(PROMPT, 9)]
    for _ in range(2):
        answers.append(server.complete(PROMPT + answers[0].text + "abc", 9))
    return answers


def test_a_draft_model_that_cannot_be_stored_is_named(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "lfm2"
    folder.mkdir()
    save_model("lfm2", folder)
    with (
        exact,
        Server(tmp_path, exact.sockets[0], "--draft-model", str(folder), model=tiny.name) as server,
    ):
        server.health()
    assert "speculative decoding takes models whose caches can be cut" in server.log.read_text()
