"""The server with a model from a folder: shared with one's own loop, and stepping aside."""

import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from model_zoo import save_model
from openai import NotFoundError
from serve_process import Server

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache

pytestmark = pytest.mark.processes

PROMPT = "".join(chr(97 + i * i % 23) for i in range(600))
CHANGED = """
import mlx_lm.server as server
known = server.LRUPromptCache.insert_cache
def insert_cache(self, model, toks, prompt_cache, *, cache_type="assistant"):
    known(self, model, toks, prompt_cache, cache_type=cache_type)
server.LRUPromptCache.insert_cache = insert_cache
"""

SPY = """
import os
import threading
from kvferry.node.hooks.prefix_cache import PrefixCache
said = os.open({said!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def spy(name):
    known = getattr(PrefixCache, name)
    def called(*args, **kwargs):
        os.write(said, f"{{name}} {{threading.get_ident()}}\\n".encode())
        return known(*args, **kwargs)
    setattr(PrefixCache, name, called)
for name in ("restore", "offer", "idle"):
    spy(name)
"""


def test_what_the_server_stored_an_own_loop_restores(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    with Server(tmp_path, cluster.sockets[0], model=tiny.name) as server:
        answer = server.complete(PROMPT)
        assert answer.prompt_tokens == 600
        # One at a time, as the server does where a seed is given.
        seeded = server.client.completions.create(
            model="default_model", prompt=PROMPT, max_tokens=8, seed=1
        )
        assert seeded.choices[0].text == answer.text
    assert server.process.returncode == 0
    tokens = tiny.tokenizer.encode(PROMPT)
    with PrefixCache(tiny, HookOptions(socket=cluster.sockets[0], gather_tokens=0)) as prefix:
        assert prefix.ready()
        _, rest = prefix.restore(tokens)
        assert prefix.last_restore is not None
        assert prefix.last_restore.restored_tokens >= 256, prefix.last_restore
        assert rest == tokens[prefix.last_restore.restored_tokens :]


def test_a_changed_mlx_lm_serves_without_us_and_says_so(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    with Server(tmp_path, cluster.sockets[0], model=tiny.name, prelude=CHANGED) as server:
        first = server.complete(PROMPT)
        again = server.complete(PROMPT)
        assert again.text == first.text
        assert again.cached_tokens == 599  # its own prompt cache
    said = [line for line in server.log.read_text().splitlines() if line.startswith("kvferry:")]
    assert len(said) == 1
    assert "insert_cache does not take tokens" in said[0]
    assert server.summary() == {}


def test_everything_runs_on_the_models_thread_and_idle_time_is_used(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    # A file of its own: in the log, lines of several threads may run into each other.
    said = tmp_path / "said"
    prelude = SPY.format(said=str(said))
    with Server(tmp_path, cluster.sockets[0], model=tiny.name, prelude=prelude) as server:
        server.complete(PROMPT)
        end = time.monotonic() + 20
        while "idle" not in said.read_text():
            assert time.monotonic() < end, server.log.read_text()
            time.sleep(0.1)
        assert server.complete(PROMPT).cached_tokens == 599
    calls = [line.split() for line in said.read_text().splitlines()]
    assert {name for name, _ in calls} == {"restore", "offer", "idle"}
    assert len({thread for _, thread in calls}) == 1
    assert server.process.returncode == 0


def test_models_take_turns_and_one_that_is_not_there_is_said_to_be(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "qwen3"
    folder.mkdir()
    save_model("qwen3", folder)
    with Server(tmp_path, cluster.sockets[0], model=tiny.name) as server:
        first = server.complete(PROMPT)
        assert server.complete(PROMPT, model=str(folder)).prompt_tokens == 600
        again = server.complete(PROMPT)
        assert again.text == first.text
        chat = server.client.chat.completions
        with pytest.raises(NotFoundError):
            chat.create(model="/no/such/model", messages=[{"role": "user", "content": "a"}])
        assert server.health() == {"status": "ok"}
    assert server.process.returncode == 0
    assert not [name for name in server.summary() if "bug" in name]


def test_models_are_listed_where_nothing_was_downloaded(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    fresh = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_CACHE": str(tmp_path / "hub" / "cache")}
    with Server(tmp_path, cluster.sockets[0], model=tiny.name, environment=fresh) as server:
        assert [model.id for model in server.client.models.list()] == [tiny.name]


def test_the_daemon_dies_and_the_server_goes_on(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    other = PROMPT[::-1]
    with Server(tmp_path, cluster.sockets[0], model=tiny.name) as server:
        server.complete(PROMPT)
        cluster.stop()
        answer = server.complete(other)
        assert server.health() == {"status": "ok"}
    assert answer.text == greedy(tiny, other, 8)
    assert answer.cached_tokens == 0
    assert server.process.returncode == 0
    assert server.summary()["miss_unavailable"] == 1


def greedy(model: LoadedModel, prompt: str, count: int) -> str:
    tokens = model.tokenizer.encode(prompt)
    steps = generate_step(mx.array(tokens), model.model, max_tokens=count)
    return model.tokenizer.decode([token for token, _ in steps])


def test_other_caches_come_back_after_a_restart(tmp_path: Path) -> None:
    """Recurrent state, sliding windows, latents with an indexer; one server, model by model."""
    folders = [tmp_path / kind for kind in ("lfm2", "gpt_oss", "deepseek_v32")]
    for folder in folders:
        folder.mkdir()
        save_model(folder.name, folder)
    cluster = Cluster(tmp_path, nodes=1)
    cluster.set_policy("exact")
    with cluster:
        with Server(tmp_path, cluster.sockets[0], model=str(folders[0])) as server:
            first = [server.complete(PROMPT, model=str(folder)) for folder in folders]
        with Server(tmp_path, cluster.sockets[0], model=str(folders[0])) as server:
            again = [server.complete(PROMPT, model=str(folder)) for folder in folders]
    assert [answer.text for answer in again] == [answer.text for answer in first]
    assert [answer.cached_tokens for answer in again] == [599, 599, 599]
    assert not [name for name in server.summary() if "bug" in name or name.startswith("drop")]
