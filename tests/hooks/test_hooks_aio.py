"""The two calls from an event loop: one thread runs the model, the loop never waits."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ModelError
from kvferry.node.hooks import AsyncPrefixCache, HookOptions

pytestmark = pytest.mark.processes

PROMPT = [1 + i * i % 25 for i in range(700)]


def logits_after(model: LoadedModel, tokens: list[int], cache: list[Any]) -> Any:
    return np.array(model.model(mx.array([tokens]), cache=cache)[0, -1])


async def test_restored_on_the_thread_that_runs_the_model(
    tiny: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    options = HookOptions(socket=cluster.sockets[0], cache_dir=tmp_path, gather_tokens=0)
    async with AsyncPrefixCache(tiny, options) as prefix:
        assert await prefix.ready()
        cache, rest = await prefix.restore(PROMPT)
        assert rest == PROMPT
        expected = await prefix.run(logits_after, tiny, rest, cache)
        assert await prefix.offer(PROMPT, cache)
        assert await prefix.flush()
        assert not await prefix.idle()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async with AsyncPrefixCache(tiny, options) as prefix:
        await prefix.ready()
        ticking = asyncio.create_task(tick())
        cache, rest = await prefix.restore(PROMPT)
        ticking.cancel()
        assert rest == PROMPT[-1:]
        assert ticks > 1
        restored = await prefix.run(logits_after, tiny, rest, cache)
    assert prefix.last_restore is not None
    assert prefix.last_restore.restored_tokens == 699
    assert prefix.counters["restores"] == 1
    await prefix.aclose()
    assert int(restored.argmax()) == int(expected.argmax())


async def test_the_callers_own_thread_is_used_and_kept(tiny: LoadedModel, tmp_path: Path) -> None:
    options = HookOptions(socket=tmp_path / "nobody.sock", cache_dir=tmp_path)
    with ThreadPoolExecutor(1) as executor:
        mine = executor.submit(threading.get_ident).result()
        async with AsyncPrefixCache(tiny, options, executor=executor) as prefix:
            assert await prefix.run(threading.get_ident) == mine
            cache, rest = await prefix.restore(PROMPT)
            assert rest == PROMPT
            assert not await prefix.offer([], cache)
        assert executor.submit(threading.get_ident).result() == mine
        with pytest.raises(ModelError, match="not open"):
            await prefix.restore(PROMPT)


async def test_an_executor_of_two_threads_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    options = HookOptions(socket=tmp_path / "nobody.sock", cache_dir=tmp_path)
    gate = threading.Event()
    with ThreadPoolExecutor(2) as executor:
        async with AsyncPrefixCache(tiny, options, executor=executor) as prefix:
            waiting = asyncio.create_task(prefix.run(gate.wait))
            await asyncio.sleep(0.05)
            try:
                with pytest.raises(ModelError, match="exactly one thread"):
                    await prefix.restore(PROMPT)
            finally:
                gate.set()
            await waiting
