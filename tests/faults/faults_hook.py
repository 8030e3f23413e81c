"""A model's process for fault tests: restores, prefills, generates and offers, as it is told.

``python faults_hook.py MODEL`` reads orders, one JSON object a line, and answers each with one.
Everything is computed in the same steps with and without a cache, so equal means: to the bit.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from blake3 import blake3

from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache

PAGE = 256


def steps(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Prefill in pieces that end where pages do; the last token by itself."""
    at = start
    while at < end - 1:
        to = min(end - 1, (at // PAGE + 1) * PAGE)
        yield at, to
        at = to
    yield end - 1, end


def pages_of(cache: list[Any], tokens: int) -> list[str]:
    """A digest for each page of a cache's first ``tokens``, and one for the rest."""
    digests = []
    for start in range(0, tokens, PAGE):
        digest = blake3()
        for layer in cache:
            for rows in (layer.keys, layer.values):
                part = np.array(rows[..., start : min(start + PAGE, tokens), :])
                digest.update(np.ascontiguousarray(part).tobytes())
        digests.append(digest.hexdigest()[:32])
    return digests


class Worker:
    """One model, and a `PrefixCache` for each daemon that it is told of."""

    def __init__(self, model: str) -> None:
        self.loaded: LoadedModel = load_model(model)
        self.caches: dict[str, PrefixCache] = {}

    def cache_of(self, order: dict[str, Any]) -> PrefixCache:
        """Connected, if the daemon is there; with the policy that is wanted."""
        socket = order["socket"]
        if socket not in self.caches:
            options = HookOptions(
                socket=Path(socket),
                cache_dir=Path(order["cache_dir"]),
                request_timeout_s=order.get("request_timeout_s", 5.0),
                max_restore_s=order.get("max_restore_s", 4.0),
                close_timeout_s=1.0,
                always_restore=True,
                gather_tokens=0,
            )
            self.caches[socket] = PrefixCache(self.loaded, options)
            self.caches[socket].ready(order.get("ready_s", 20.0))
        found = self.caches[socket]
        end = time.monotonic() + order.get("policy_s", 20.0)
        while order.get("policy") and found.policy.name != order["policy"]:
            if time.monotonic() > end:
                raise RuntimeError(f"policy {found.policy.name}, {order['policy']} wanted")
            time.sleep(0.02)
        return found

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """One request, as an engine serves it. Without a socket: without kvferry."""
        prompt: list[int] = order["prompt"]
        prefix = self.cache_of(order) if order.get("socket") else None
        started = time.monotonic()
        if prefix is None:
            cache, rest = self.fresh(), prompt
        else:
            cache, rest = prefix.restore(prompt)
        restore_s = time.monotonic() - started
        restored = len(prompt) - len(rest)
        pages = pages_of(cache, restored)
        digest, tokens, slowest = blake3(), [], 0.0
        logits = np.zeros(0, np.float32)
        for start, end in steps(restored, len(prompt)):
            logits = self.step(prompt[start:end], cache)
        offered = False
        offer_s = 0.0
        if prefix is not None and order.get("offer"):
            before = time.monotonic()
            offered = prefix.offer(prompt, cache)
            offer_s = time.monotonic() - before
        for _ in range(order.get("generate", 8)):
            digest.update(logits.tobytes())
            tokens.append(int(logits.argmax()))
            before = time.monotonic()
            logits = self.step([tokens[-1]], cache)
            slowest = max(slowest, time.monotonic() - before)
        flush_s = order.get("flush", 0.0)
        flushed, end = None, time.monotonic() + flush_s
        while prefix is not None and not flushed and time.monotonic() < end:
            flushed = prefix.flush(end - time.monotonic())  # at once, while it reconnects
            time.sleep(0.0 if flushed else 0.1)
        report = prefix.last_restore if prefix is not None else None
        return {
            "restored": restored,
            "reason": report.reason if report is not None else "",
            "pages": pages,
            "logits": digest.hexdigest(),
            "tokens": tokens,
            "restore_s": restore_s,
            "offer_s": offer_s,
            "slowest_step_s": slowest,
            "offered": offered,
            "flushed": flushed,
            "counters": dict(prefix.counters) if prefix is not None else {},
        }

    def fresh(self) -> list[Any]:
        """An empty cache."""
        from mlx_lm.models.cache import make_prompt_cache

        made: list[Any] = make_prompt_cache(self.loaded.model)
        return made

    def step(self, tokens: list[int], cache: list[Any]) -> "np.ndarray[Any, Any]":
        """Logits after the last of ``tokens``."""
        logits = self.loaded.model(mx.array([tokens]), cache=cache)
        mx.eval(logits)
        return np.array(logits[0, -1].astype(mx.float32))

    def close(self) -> None:
        """Let go of all daemons."""
        for prefix in self.caches.values():
            prefix.close()
        self.caches.clear()


def main() -> None:
    """See the module."""
    worker = Worker(sys.argv[1])
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print shall not be taken for an answer
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "close":
            worker.close()
            reply: dict[str, Any] = {}
        else:
            try:
                reply = worker.run(order)
            except Exception as exc:
                reply = {"failed": repr(exc)}
        out.write(json.dumps({**reply, "number": order["number"]}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
