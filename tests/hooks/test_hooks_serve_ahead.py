"""A request whose blobs are being fetched does not hold up answers that are being generated."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serve_process import Server

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import FerryError
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.server.ahead import Ahead

PROMPT = "".join(chr(97 + i * i % 23) for i in range(600))
OTHER = "".join(chr(97 + i * i * i % 19) for i in range(40))
SLOW_S = 2.0
SLOW = f"""
import os, time
from kvferry.node.hooks.restoring import Restoring
said = os.open({{said!r}}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
known = Restoring._load
def load(self, tokens, *others):
    began = time.time()
    found = known(self, tokens, *others)
    time.sleep({SLOW_S})
    os.write(said, f"{{{{len(tokens)}}}} {{{{began}}}} {{{{time.time()}}}}\\n".encode())
    return found
Restoring._load = load
"""


@pytest.mark.processes
def test_others_go_on_while_blobs_are_fetched(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.set_policy("exact")
    with Server(tmp_path, cluster.sockets[0], model=tiny.name) as server:
        cold = server.complete(PROMPT)
    said = tmp_path / "said"
    prelude = SLOW.format(said=str(said))
    pieces: list[float] = []
    done = threading.Event()

    def generate(server: Server) -> None:
        kind: Any = {"0": -100}  # its end
        with server.client.completions.create(
            model="default_model", prompt=OTHER, max_tokens=4000, stream=True, logit_bias=kind
        ) as chunks:
            for _ in chunks:
                pieces.append(time.time())
                if done.is_set():
                    break

    with Server(tmp_path, cluster.sockets[0], model=tiny.name, prelude=prelude) as server:
        thread = threading.Thread(target=generate, args=(server,))
        thread.start()
        while len(pieces) < 5:
            assert thread.is_alive(), server.log.read_text()
            time.sleep(0.01)
        restored = server.complete(PROMPT)
        done.set()
        thread.join()
    assert restored.cached_tokens == 599
    assert restored.text == cold.text
    began, ended = next(
        (float(line.split()[1]), float(line.split()[2]))
        for line in said.read_text().splitlines()
        if line.startswith("600 ")
    )
    assert sum(began < at < ended for at in pieces) > 5
    assert server.process.returncode == 0
    assert not [name for name in server.summary() if "bug" in name]
    assert server.summary()["restored_requests"] == 1


def test_only_what_was_loaded_for_these_tokens_is_taken() -> None:
    ahead = Ahead()
    loaded = Loaded(tokens=2)
    assert ahead.take([1, 2, 3]) == (None, 0.0)
    assert ahead.begin([1, 2, 3], lambda: loaded)
    while ahead.under_way(1.0):
        pass
    assert ahead.take([1, 2, 4]) == (None, 0.0)
    ahead.begin([1, 2, 3], lambda: loaded)
    assert not ahead.under_way(10.0)
    assert ahead.take([1, 2, 3])[0] is loaded
    assert ahead.take([1, 2, 3])[0] is None

    def broken() -> Loaded:
        raise FerryError("broken")

    ahead.begin([1], broken)
    assert not ahead.under_way(10.0)
    assert ahead.take([1])[0] is None
    ahead.clear()
    assert not ahead.under_way()
