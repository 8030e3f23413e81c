"""The whole journey with TLS and tokens on every TCP connection, on loopback and beyond."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llama import save_model, sharp_llama

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.authority import Authority
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.node.client import NodeClient
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache

pytestmark = pytest.mark.processes

VOCABULARY = 64
PROMPT = [(7 * i * i + i) % VOCABULARY for i in range(900)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(*sharp_llama(VOCABULARY), folder)
    return load_model(str(folder))


def own_address() -> str:
    """An address of this machine that others could use."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no address beyond loopback")
        return str(probe.getsockname()[0])


@pytest.fixture
def host(request: pytest.FixtureRequest) -> str:
    return "127.0.0.1" if request.param == "loopback" else own_address()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca")


@pytest.fixture
def cluster(
    tmp_path: Path, host: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    monkeypatch.setenv("KVFERRY_SECURITY_TLS_DIR", str(authority.issue("machine", [host])))
    made = Cluster(tmp_path, nodes=2, host=host)
    made.set_policy("exact")
    with made:
        yield made


def prefill(model: LoadedModel, tokens: list[int], cache: list[Any]) -> np.ndarray[Any, Any]:
    for start in range(0, len(tokens), 256):
        logits = model.model(mx.array([tokens[start : start + 256]]), cache=cache)
        mx.eval(logits)
    return np.array(logits[0, -1])


def joined(cluster: Cluster, node: int) -> None:
    """Until the node knows its namespace, its policy, and its peer."""
    end = time.monotonic() + 30
    with NodeClient(cluster.sockets[node]) as client:
        while time.monotonic() < end:
            hello, status = client.hello(), client.status()
            if hello.policy.name == "exact" and hello.namespace_salt and status.peers:
                assert status.store_reachable
                return
            time.sleep(0.05)
    pytest.fail("the node did not join")


@pytest.mark.parametrize("host", ["loopback", "beyond"], indirect=True)
def test_a_prompt_comes_back_bit_for_bit_on_another_machine(
    tiny: LoadedModel, cluster: Cluster, host: str, tmp_path: Path
) -> None:
    for node in range(2):
        joined(cluster, node)
    options = [
        HookOptions(socket=path, cache_dir=tmp_path / "cache", always_restore=True)
        for path in cluster.sockets
    ]
    with PrefixCache(tiny, options[0]) as first:
        assert first.ready()
        cache, rest = first.restore(PROMPT)
        assert rest == PROMPT
        expected = prefill(tiny, PROMPT, cache)
        assert first.offer(PROMPT, cache)
        assert first.flush()
    with PrefixCache(tiny, options[1]) as second:
        assert second.ready()
        again, rest = second.restore(PROMPT)
        assert rest == PROMPT[-1:]
        for mine, theirs in zip(cache, again, strict=True):
            np.testing.assert_array_equal(
                np.array(mine.keys[..., :899, :]), np.array(theirs.keys[..., :899, :])
            )
        got = prefill(tiny, rest, again)
        assert int(got.argmax()) == int(expected.argmax())
    with NodeClient(cluster.sockets[1]) as client:
        counters = client.status().counters
    assert counters["hits_peer"] + counters["hits_store"] > 0


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "kvferry", *arguments], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("host", ["beyond"], indirect=True)
def test_commands_show_what_the_settings_name(
    cluster: Cluster, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cluster.service("store").wait_ready()["address"]
    coordinator = cluster.service("coordinator").wait_ready()["address"]
    at = ("--store", store, "--coordinator", coordinator, "--socket", str(cluster.sockets[0]))
    status, out = run("status", *at, "--json", "-")
    assert status == 0
    found = json.loads(out)
    assert all(found[name]["up"] for name in ("node", "store", "coordinator"))
    for address in (store, coordinator):
        assert run("health", address)[0] == 0
    assert run("verify", store)[0] == 1
    status, out = run("policy", "set", "default", "--coordinator", coordinator)
    assert status == 1
    assert "needs the right to admin" in out
    monkeypatch.setenv("KVFERRY_SECURITY_TOKEN_FILE", str(authority.folder / "admin.token"))
    assert run("policy", "set", "default", "--coordinator", coordinator)[0] == 0
    assert run("verify", store)[0] == 0
    # Without a certificate nobody gets as far as tokens, not even to the health check.
    monkeypatch.delenv("KVFERRY_SECURITY_TLS_DIR")
    status, out = run("health", store)
    assert status in (1, 2)
    assert "tls_dir" in out
    monkeypatch.delenv("KVFERRY_SECURITY_TOKEN_FILE")
    status, out = run("status", *at[:4], "--json", "-")
    assert not any(json.loads(out)[name]["up"] for name in ("store", "coordinator"))
