"""The bridge with a real model, daemon and store, as the server's prompt cache calls it."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from model_zoo import prefilled, save_model

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache
from kvferry.node.hooks.server.bridge import Bridge

pytestmark = pytest.mark.processes

KEY = ("tiny", None, None)
PROMPT = [1 + i * i % 25 for i in range(700)]


@pytest.fixture
def exact(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, nodes=1)
    cluster.set_policy("exact")
    with cluster:
        yield cluster


def options(cluster: Cluster, folder: Path, **others: Any) -> HookOptions:
    return HookOptions(
        socket=cluster.sockets[0], cache_dir=folder / "cache", gather_tokens=0, **others
    )


def prefill(model: LoadedModel, tokens: list[int], cache: list[Any] | None = None) -> list[Any]:
    cache = make_prompt_cache(model.model) if cache is None else cache
    mx.eval(model.model(mx.array([tokens]), cache=cache))
    return cache


def keys(cache: list[Any], tokens: int) -> list[Any]:
    return [np.array(layer.keys[..., :tokens, :]) for layer in cache]


def wait_policy(bridge: Bridge, name: str) -> None:
    prefix, end = bridge._prefix, time.monotonic() + 20
    assert prefix is not None
    while prefix.policy.name != name:
        assert time.monotonic() < end, prefix.policy.name
        time.sleep(0.02)


def test_a_second_server_restores_what_the_first_kept(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    bridge = Bridge(options(exact, tmp_path))
    bridge.attach(KEY, tiny)
    assert bridge.fetch(KEY, PROMPT, None, PROMPT) == (None, PROMPT)
    cache = prefill(tiny, PROMPT[:-1])
    bridge.inserted(KEY, PROMPT[:-1], cache, "user")
    bridge.detach()
    assert bridge.counters["miss_not_stored"] == 1
    assert bridge.counters["blobs_put"] > 0

    exact.set_policy("default")
    second = Bridge(options(exact, tmp_path))
    second.attach(KEY, tiny)
    wait_policy(second, "default")
    restored, rest = second.fetch(KEY, PROMPT, None, PROMPT)
    assert restored is not None
    assert list(rest) == PROMPT[-1:]
    for mine, theirs in zip(keys(restored, 699), keys(cache, 699), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    # What came out of the store is known by its tokens, whatever object holds it now.
    longer = [*PROMPT, *PROMPT]
    second.inserted(KEY, longer, prefill(tiny, PROMPT, prefill(tiny, PROMPT)), "assistant")
    second.detach()
    assert second.counters["restored_tokens"] == 699
    # Pages 0 and 1 were restored and stay exact; 2 and 3 are coded as the policy says now.
    assert second.counters["blobs_put"] == 3
    assert not [name for name in second.counters if "bug" in name]


def test_what_is_at_hand_is_taken_where_no_more_is_stored(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    with PrefixCache(tiny, options(exact, tmp_path)) as prefix:
        assert prefix.ready()
        prefix.offer(PROMPT, prefill(tiny, PROMPT))
        assert prefix.flush()
        prefix.restore(PROMPT, beyond=699)
        assert prefix.last_restore is not None
        assert prefix.last_restore.reason == ""
        _, rest = prefix.restore([*PROMPT, 3], beyond=700)
        assert len(rest) == 701
        assert prefix.last_restore.reason == "no_gain"
        assert prefix.last_restore.bytes == 0
    bridge = Bridge(options(exact, tmp_path))
    bridge.attach(KEY, tiny)
    longer = [*PROMPT, *range(1, 25), *range(1, 25), *range(1, 25)]
    at_hand = prefill(tiny, longer[:-70])
    assert bridge.fetch(KEY, longer, at_hand, longer[-70:])[0] is at_hand
    short = prefill(tiny, longer[:30])
    found, rest = bridge.fetch(KEY, longer, short, longer[30:])
    assert found is not short
    assert len(rest) == len(longer) - 700
    # So little is sooner prefilled than asked for.
    assert bridge.fetch(KEY, longer, at_hand, longer[-20:])[0] is at_hand
    assert bridge.counters["local_hits"] == 1
    bridge.detach()


def test_images_other_models_and_quantized_caches_are_left_to_the_server(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    bridge = Bridge(options(exact, tmp_path))
    bridge.attach(KEY, tiny)
    pictured = [*PROMPT[:300], -5, *PROMPT[300:]]
    assert bridge.fetch(KEY, pictured, None, pictured) == (None, pictured)
    bridge.inserted(KEY, pictured, prefill(tiny, PROMPT), "assistant")
    assert bridge.counters["miss_media"] == 2
    other = ("other", None, None)
    assert bridge.fetch(other, PROMPT, None, PROMPT) == (None, PROMPT)
    bridge.inserted(other, PROMPT, prefill(tiny, PROMPT), "assistant")
    bridge.inserted(KEY, PROMPT, [QuantizedKVCache() for _ in range(3)], "assistant")
    assert bridge.counters["drop_quantized"] == 1
    bridge.detach()
    assert bridge.counters["blobs_put"] == 0


def test_a_bug_of_ours_is_a_miss(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    bridge = Bridge(options(exact, tmp_path))
    bridge.attach(KEY, tiny)
    monkeypatch.setattr(PrefixCache, "restore", broken)
    monkeypatch.setattr(PrefixCache, "offer", broken)
    assert bridge.fetch(KEY, PROMPT, None, PROMPT) == (None, PROMPT)
    bridge.inserted(KEY, PROMPT, prefill(tiny, PROMPT), "assistant")
    bridge.detach()
    assert bridge.counters["bug_fetch"] == bridge.counters["bug_insert"] == 1


def test_a_daemon_that_hangs_is_left_alone_after_two_tries(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    bridge = Bridge(options(exact, tmp_path, request_timeout_s=1.2))
    bridge.attach(KEY, tiny)
    daemon = exact.service("node0").process
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        for _ in range(6):
            assert bridge.fetch(KEY, PROMPT, None, PROMPT) == (None, PROMPT)
        assert bridge.counters["miss_breaker"] >= 3
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    end = time.monotonic() + 30
    asked = bridge.counters["miss_breaker"]
    while bridge.counters["miss_breaker"] > asked - 1 and time.monotonic() < end:
        asked = bridge.counters["miss_breaker"]
        bridge.fetch(KEY, PROMPT, None, PROMPT)
        if bridge.counters["miss_breaker"] == asked:
            break
        time.sleep(0.1)
    bridge.detach()
    assert bridge.counters["miss_not_stored"] >= 1


def test_conversations_share_a_system_prompt_that_cannot_be_cut(
    exact: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "lfm2"
    folder.mkdir()
    save_model("lfm2", folder)
    model = load_model(str(folder))
    tokens = [1 + i * i % 25 for i in range(620)]
    first = Bridge(options(exact, tmp_path))
    first.attach(KEY, model)
    assert first.fetch(KEY, tokens[:600], None, tokens[:600])[0] is None
    first.inserted(KEY, tokens[:300], prefilled(model.model, tokens[:300]), "system")
    first.inserted(KEY, tokens[:599], prefilled(model.model, tokens[:599]), "user")
    first.inserted(KEY, tokens, prefilled(model.model, tokens), "assistant")
    first.detach()
    second = Bridge(options(exact, tmp_path))
    second.attach(KEY, model)
    for wanted, held in (
        ([*tokens[:300], *range(1, 25), *range(1, 25), *range(1, 25)], 300),
        (tokens[:600], 599),
        ([*tokens, *range(1, 25), *range(1, 25), *range(1, 25)], 620),
    ):
        assert second.fetch(KEY, wanted, None, wanted)[1] == wanted[held:]
    second.detach()
