"""The two calls, with the real model, a real store, coordinator and node daemon."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = [pytest.mark.model, pytest.mark.processes]

PROMPT = list(range(2000, 2700))


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, nodes=1)
    cluster.set_policy("exact")
    with cluster:
        yield cluster


def connect(model: LoadedModel, cluster: Cluster, cache_dir: Path, policy: str) -> PrefixCache:
    prefix = PrefixCache(model, HookOptions(socket=cluster.sockets[0], cache_dir=cache_dir))
    assert prefix.ready()
    wait_policy(prefix, policy)
    return prefix


def wait_policy(prefix: PrefixCache, name: str) -> None:
    end = time.monotonic() + 20
    while prefix.policy.name != name:
        assert time.monotonic() < end, f"policy {name} did not arrive: {prefix.policy.name}"
        time.sleep(0.02)


def prefill(model: LoadedModel, tokens: list[int], cache: list[Any]) -> np.ndarray[Any, Any]:
    for start in range(0, len(tokens), 256):
        logits = model.model(mx.array([tokens[start : start + 256]]), cache=cache)
        mx.eval(logits)
    return np.array(logits[0, -1])


def keys_of(cache: list[Any], tokens: int) -> list[np.ndarray[Any, Any]]:
    return [np.array(layer.keys[..., :tokens, :]) for layer in cache]


def test_exact_codec_gives_back_every_bit(
    smollm2: LoadedModel, cluster: Cluster, calibrated: Path
) -> None:
    with connect(smollm2, cluster, calibrated, "exact") as prefix:
        cache, remaining = prefix.restore(PROMPT)
        assert remaining == PROMPT
        assert prefix.last_restore is not None
        assert prefix.last_restore.reason == "not_stored"
        expected = prefill(smollm2, remaining, cache)
        assert prefix.offer(PROMPT, cache)
        assert prefix.flush()
        again, rest = prefix.restore(PROMPT)
        assert rest == PROMPT[-1:]
        for mine, theirs in zip(keys_of(cache, 699), keys_of(again, 699), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_allclose(prefill(smollm2, rest, again), expected, atol=2e-3)


def test_a_longer_prompt_uses_the_pages_and_a_shorter_one_never_too_much(
    smollm2: LoadedModel, cluster: Cluster, calibrated: Path
) -> None:
    with connect(smollm2, cluster, calibrated, "exact") as prefix:
        cache, _ = prefix.restore(PROMPT)
        prefill(smollm2, PROMPT, cache)
        prefix.offer(PROMPT, cache)
        assert prefix.flush()
        # 700 tokens: two pages lie behind the window, 188 tokens are the tail.
        _, rest = prefix.restore([*PROMPT, 1, 2, 3])
        assert rest == [1, 2, 3]
        _, rest = prefix.restore([*PROMPT[:600], 5, 6])
        assert rest == [*PROMPT[512:600], 5, 6]
        _, rest = prefix.restore(PROMPT[:512])
        assert rest == PROMPT[511:512]
        changed = [*PROMPT[:300], 9, *PROMPT[301:]]
        _, rest = prefix.restore(changed)
        assert rest == changed[256:]


def test_the_default_codec_is_close_and_a_policy_change_takes_hold(
    smollm2: LoadedModel, cluster: Cluster, calibrated: Path
) -> None:
    with connect(smollm2, cluster, calibrated, "exact") as prefix:
        cluster.set_policy("default")
        wait_policy(prefix, "default")
        cache, _ = prefix.restore(PROMPT)
        expected = prefill(smollm2, PROMPT, cache)
        prefix.offer(PROMPT, cache)
        assert prefix.flush()
        raw, put = prefix.counters["bytes_raw_fp16"], prefix.counters["bytes_put"]
        assert raw / put > 2.5
        again, rest = prefix.restore(PROMPT)
        assert len(rest) == 1
        got = prefill(smollm2, rest, again)
        assert int(got.argmax()) == int(expected.argmax())
        assert not np.array_equal(got, expected)
        # An exact policy must not be served lossy pages.
        cluster.set_policy("exact")
        wait_policy(prefix, "exact")
        _, rest = prefix.restore(PROMPT)
        assert rest == PROMPT


def test_a_page_from_the_store_is_not_coded_again(
    smollm2: LoadedModel, cluster: Cluster, calibrated: Path
) -> None:
    with connect(smollm2, cluster, calibrated, "exact") as prefix:
        cache, _ = prefix.restore(PROMPT)
        prefill(smollm2, PROMPT, cache)
        prefix.offer(PROMPT, cache)
        assert prefix.flush()
        cluster.set_policy("default")
        wait_policy(prefix, "default")
        before = prefix.counters["blobs_put"]
        longer = [*PROMPT, *range(3000, 3400)]
        cache, rest = prefix.restore(longer)
        assert len(rest) == 400
        prefill(smollm2, rest, cache)
        prefix.offer(longer, cache)
        assert prefix.flush()
        # Pages 0 and 1 came back exact and stay so; only page 2 (two layer groups) and
        # the new tail are written.
        assert prefix.counters["blobs_put"] - before == 3


def test_without_a_daemon_the_model_prefills_and_everything_is_counted(
    smollm2: LoadedModel, tmp_path: Path
) -> None:
    options = HookOptions(socket=tmp_path / "nobody.sock", cache_dir=tmp_path)
    with PrefixCache(smollm2, options) as prefix:
        prefix.ready()
        cache, remaining = prefix.restore(PROMPT)
        assert remaining == PROMPT
        prefill(smollm2, remaining, cache)
        prefix.offer(PROMPT, cache)
        assert prefix.last_restore is not None
        assert prefix.last_restore.restored_tokens == 0
        assert prefix.last_restore.reason
        assert sum(v for k, v in prefix.counters.items() if k.startswith("miss_")) == 1


def test_turn_end_only_policy_stores_nothing_after_prefill(
    smollm2: LoadedModel, cluster: Cluster, calibrated: Path
) -> None:
    with connect(smollm2, cluster, calibrated, "exact") as prefix:
        text = cluster.policy_file.read_text()
        assert "after_prefill" in text
        cluster.policy_file.write_text(
            text.replace('"after_prefill", ', "", 1).replace('"exact"', '"late"', 1)
        )
        wait_policy(prefix, "late")
        cache, _ = prefix.restore(PROMPT)
        prefill(smollm2, PROMPT, cache)
        assert not prefix.offer(PROMPT, cache, "prefill")
        assert prefix.flush()
        assert prefix.counters["blobs_put"] == 0
        assert prefix.offer(PROMPT, cache, "turn_end")
        assert prefix.flush()
        assert prefix.counters["blobs_put"] > 0


def test_what_coding_costs_reaches_the_coordinator(
    smollm2: LoadedModel, cluster: Cluster, calibrated: Path
) -> None:
    cluster.set_policy("default")
    address = cluster.service("coordinator").wait_ready()["address"]

    async def ask() -> pb.ExplainReply:
        async with CoordinatorClient(address) as client:
            return await client.explain(30)

    with connect(smollm2, cluster, calibrated, "default") as prefix:
        end = time.monotonic() + 30
        while not (found := asyncio.run(ask()).decisions):
            assert time.monotonic() < end, "no curve arrived"
            time.sleep(0.1)
        assert prefix.model_id == found[0].model_id
    (decision,) = found
    assert [node.node_id for node in decision.nodes] == ["machine-0"]
    assert [(p.layer_start, p.layer_end) for p in decision.parts] == [(0, 15), (15, 30)]
    # One machine: one step for all is the best there is, and needs no rules of its own.
    assert 0 < decision.kl_nats <= decision.budget_nats == 0.005
    assert {part.options["target_kl"] for part in decision.parts} == {"0.005"}
