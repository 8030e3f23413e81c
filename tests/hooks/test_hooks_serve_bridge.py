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
from mlx_lm.models.cache import make_prompt_cache
from model_zoo import prefilled, save_model

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache
from kvferry.node.hooks.server.bridge import Bridge
from kvferry.node.hooks.server.served import Quantized, Served
from kvferry.node.hooks.server.stored import Plain

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


def prefix_of(bridge: Bridge) -> PrefixCache:
    assert isinstance(bridge._stored, Plain)
    return bridge._stored.prefix


def wait_policy(bridge: Bridge, name: str) -> None:
    prefix, end = prefix_of(bridge), time.monotonic() + 20
    while prefix.policy.name != name:
        assert time.monotonic() < end, prefix.policy.name
        time.sleep(0.02)


def test_a_second_server_restores_what_the_first_kept(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    bridge = Bridge(options(exact, tmp_path))
    bridge.attach(KEY, Served(tiny))
    assert bridge.fetch(KEY, PROMPT, None, PROMPT) == (None, PROMPT)
    cache = prefill(tiny, PROMPT[:-1])
    bridge.inserted(KEY, PROMPT[:-1], cache, "user")
    bridge.detach()
    assert bridge.counters["miss_not_stored"] == 1
    assert bridge.counters["blobs_put"] > 0

    exact.set_policy("default")
    second = Bridge(options(exact, tmp_path))
    second.attach(KEY, Served(tiny))
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
    bridge.attach(KEY, Served(tiny))
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


def test_other_models_are_left_to_the_server(
    wide: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    bridge = Bridge(options(exact, tmp_path))
    bridge.attach(KEY, Served(wide))
    other = ("other", None, None)
    assert bridge.fetch(other, PROMPT, None, PROMPT) == (None, PROMPT)
    bridge.inserted(other, PROMPT, prefill(wide, PROMPT), "assistant")
    # Nor is a form of cache stored that this server was not told to make.
    cache = [layer.to_quantized(group_size=32, bits=8) for layer in prefill(wide, PROMPT)]
    bridge.inserted(KEY, PROMPT, cache, "assistant")
    bridge.detach()
    assert bridge.counters["drop_model"] == 1
    assert bridge.counters["blobs_put"] == 0


def test_what_comes_before_an_image_is_stored_and_nothing_behind(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    """The server names images by negative numbers: two of one size have the same tokens."""
    first = Bridge(options(exact, tmp_path))
    first.attach(KEY, Served(tiny))
    pictured = [*PROMPT[:600], -5, -5, *PROMPT[600:]]
    assert first.fetch(KEY, pictured, None, pictured) == (None, pictured)
    cache = prefill(tiny, [*PROMPT[:600], 7, 7, *PROMPT[600:]])
    first.inserted(KEY, pictured, cache, "assistant")
    first.detach()
    second = Bridge(options(exact, tmp_path))
    second.attach(KEY, Served(tiny))
    for wanted, held in (
        (pictured, 600),
        ([*PROMPT[:600], -9, *PROMPT[600:]], 600),
        ([*PROMPT[:300], -5, *PROMPT], 256),
        ([*PROMPT[:600], 7, 7, *PROMPT[600:]], 600),
    ):
        found, rest = second.fetch(KEY, wanted, None, wanted)
        assert rest == wanted[held:]
        assert found is not None
        for mine, theirs in zip(keys(found, held), keys(cache, held), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    # An image in the first tokens leaves nothing to restore.
    early = [-3, *PROMPT]
    assert second.fetch(KEY, early, None, early) == (None, early)
    second.detach()
    assert not [name for name in second.counters if "bug" in name]


def test_a_cache_that_went_on_with_other_tokens_is_stored_anew(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    first = Bridge(options(exact, tmp_path))
    first.attach(KEY, Served(tiny))
    first.inserted(KEY, PROMPT[:-1], prefill(tiny, PROMPT[:-1]), "user")
    first.detach()
    second = Bridge(options(exact, tmp_path))
    second.attach(KEY, Served(tiny))
    cache, _ = second.fetch(KEY, PROMPT, None, PROMPT)
    assert cache is not None
    second.inserted(KEY, PROMPT, prefill(tiny, PROMPT[-1:], cache), "assistant")
    prefix = prefix_of(second)
    assert prefix.flush()
    before = prefix.counters["blobs_put"]
    # The server cuts a cache that it keeps, and another conversation goes on with it.
    for layer in cache:
        layer.trim(600)
    other = [*PROMPT[:100], *PROMPT[::-1][:600]]
    prefix.offer(other, prefill(tiny, other[100:], cache))
    second.detach()
    # Its two pages and its tail; none of it counts as what was restored.
    assert second.counters["blobs_put"] == before + 3


def test_quantized_caches_come_back_as_they_were(
    wide: LoadedModel, exact: Cluster, tmp_path: Path
) -> None:
    """Once they are quantized; until then they are those of every other server."""
    served = Served(wide, quantized=Quantized(bits=8, group_size=32, start=500))
    plain = prefill(wide, PROMPT[:480])
    packed = [layer.to_quantized(group_size=32, bits=8) for layer in prefill(wide, PROMPT)]
    first = Bridge(options(exact, tmp_path))
    first.attach(KEY, served)
    first.inserted(KEY, PROMPT[:480], plain, "assistant")
    first.inserted(KEY, PROMPT, packed, "assistant")
    first.detach()
    second = Bridge(options(exact, tmp_path))
    second.attach(KEY, served)
    asked = [*PROMPT, 3, 4]
    found, rest = second.fetch(KEY, asked, None, asked)
    assert found is not None
    assert rest == [3, 4]
    for mine, theirs in zip(found, packed, strict=True):
        for ours, parts in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            for one, other in zip(ours, parts, strict=True):
                length = len(PROMPT)
                np.testing.assert_array_equal(
                    np.array(one[..., :length, :]), np.array(other[..., :length, :])
                )
    # 300 shared tokens of a quantized cache would be plain where the server computes them.
    shared = [*PROMPT[:300], *PROMPT[::-1][:250]]
    found, rest = second.fetch(KEY, shared, None, shared)
    assert found is not None
    assert type(found[0]).__name__ == "KVCache"
    assert len(shared) - len(rest) == 256
    second.detach()
    # Other bits, other numbers.
    third = Bridge(options(exact, tmp_path))
    third.attach(KEY, Served(wide, quantized=Quantized(bits=4, group_size=32, start=500)))
    found, rest = third.fetch(KEY, asked, None, asked)
    assert len(asked) - len(rest) == 480
    assert found is not None
    assert type(found[0]).__name__ == "KVCache"
    third.detach()
    for bridge in (first, second, third):
        names = [n for n in bridge.counters if "bug" in n or n.startswith("drop")]
        assert not names


@pytest.mark.parametrize("stored_tokens", [700, 300, 0])
def test_with_a_draft_model_both_caches_stand_at_one_position(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path, stored_tokens: int
) -> None:
    """However much is stored of the draft model's: the rest of it is prefilled."""
    folder = tmp_path / "draft"
    folder.mkdir()
    save_model("qwen3", folder)
    draft = load_model(str(folder))
    first = Bridge(options(exact, tmp_path))
    first.attach(KEY, Served(tiny))
    first.inserted(KEY, PROMPT, prefill(tiny, PROMPT), "assistant")
    first.attach(KEY, Served(draft))
    if stored_tokens:
        first.inserted(KEY, PROMPT[:stored_tokens], prefill(draft, PROMPT[:stored_tokens]))
    first.detach()
    both = Bridge(options(exact, tmp_path))
    both.attach(KEY, Served(tiny, draft))
    asked = [*PROMPT[:640], *PROMPT[::-1][:80]]
    found, rest = both.fetch(KEY, asked, None, asked)
    assert found is not None
    assert rest == asked[512:]
    assert [layer.offset for layer in found] == [512] * (3 + 4)
    expected = [*prefill(tiny, PROMPT[:512]), *prefill(draft, PROMPT[:512])]
    for mine, theirs in zip(keys(found, 512), keys(expected, 512), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    # mlx-lm leaves the model a token behind its answer, and the draft model two.
    answered = [*prefill(tiny, PROMPT[:-1]), *prefill(draft, PROMPT[:-2])]
    assert both.aligned(KEY, PROMPT, answered) == PROMPT[:-2]
    assert [layer.offset for layer in answered] == [698] * 7
    both.detach()
    assert not [name for name in both.counters if "bug" in name]


def test_a_bug_of_ours_is_a_miss(
    tiny: LoadedModel, exact: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    bridge = Bridge(options(exact, tmp_path))
    bridge.attach(KEY, Served(tiny))
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
    bridge.attach(KEY, Served(tiny))
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
    first.attach(KEY, Served(model))
    assert first.fetch(KEY, tokens[:600], None, tokens[:600])[0] is None
    first.inserted(KEY, tokens[:300], prefilled(model.model, tokens[:300]), "system")
    first.inserted(KEY, tokens[:599], prefilled(model.model, tokens[:599]), "user")
    first.inserted(KEY, tokens, prefilled(model.model, tokens), "assistant")
    first.detach()
    second = Bridge(options(exact, tmp_path))
    second.attach(KEY, Served(model))
    for wanted, held in (
        ([*tokens[:300], *range(1, 25), *range(1, 25), *range(1, 25)], 300),
        (tokens[:600], 599),
        ([*tokens, *range(1, 25), *range(1, 25), *range(1, 25)], 620),
    ):
        assert second.fetch(KEY, wanted, None, wanted)[1] == wanted[held:]
    second.detach()
