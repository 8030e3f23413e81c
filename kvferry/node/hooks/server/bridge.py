"""Between the server's prompt cache and kvferry: what is at hand first, then what is stored.

Everything here runs on the thread that runs the model, and nothing that goes wrong here
reaches the server: it is a miss, counted, and the model prefills.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import FerryError
from kvferry.node.backoff import Breaker
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache
from kvferry.node.hooks.report import RestoreReport
from kvferry.node.hooks.server.turns import Turns

log = logging.getLogger(__name__)

# Prefilling so few tokens is sooner done than asking for them.
WORTH_ASKING = 64
READY_TIMEOUT_S = 10.0
# So long without a request before the model's thread does work of ours.
QUIET_S = 1.0
# A restore that took so long and brought nothing: the daemon hangs.
HANGING_S = 1.0

Cache = list[Any]


class Bridge:
    """kvferry beside the prompt cache of a server that has one model loaded at a time.

    Args:
        options: of the `PrefixCache` that each model gets.
        ready_timeout_s: how long a model that was just loaded may wait for its identity;
            requests that come before are misses.

    Attributes:
        counters: ``requests``, ``local_hits``, ``restored_requests``, ``restored_tokens``,
            and those of the `PrefixCache`s.
    """

    def __init__(self, options: HookOptions, ready_timeout_s: float = READY_TIMEOUT_S) -> None:
        self.counters: Counter[str] = Counter()
        self._options, self._ready_timeout_s = options, ready_timeout_s
        self._key: object = None
        self._prefix: PrefixCache | None = None
        self._turns, self._breaker = Turns(), Breaker(first_s=1.0, most_s=30.0)
        self._served_at = time.monotonic()

    # -- models -------------------------------------------------------------------

    def attach(self, key: object, loaded: LoadedModel) -> None:
        """A model was loaded; ``key`` is what the server calls it. Never raises."""
        self.detach()
        with _ours("attach", self.counters):
            try:
                prefix = PrefixCache(loaded, self._options)
            except FerryError as exc:
                log.warning("served without stored caches: %s", exc)
                return
            self._key, self._prefix = key, prefix
            prefix.ready(self._ready_timeout_s)

    def detach(self) -> None:
        """The model goes: hand over what is still to be stored. May be called twice."""
        prefix, self._prefix, self._key = self._prefix, None, None
        self._turns.clear()
        if prefix is not None:
            with _ours("close", self.counters):
                prefix.close()
            self.counters.update(prefix.counters)

    # -- the prompt cache ---------------------------------------------------------

    def fetch(
        self, key: object, tokens: Sequence[int], cache: Cache | None, rest: Sequence[int]
    ) -> tuple[Cache | None, Sequence[int]]:
        """What the server found itself, or what is stored where that is more.

        Args:
            cache, rest: the server's own finding: a cache, or None, and the tokens that
                are to be prefilled.
        Returns: the same, or a restored cache and what remains then.
        """
        self._served_at = time.monotonic()
        with _ours("fetch", self.counters):
            return self._fetch(key, list(tokens), cache, rest)
        return cache, rest

    def _fetch(
        self, key: object, tokens: list[int], cache: Cache | None, rest: Sequence[int]
    ) -> tuple[Cache | None, Sequence[int]]:
        self.counters["requests"] += 1
        found, held = cache, len(tokens) - len(rest)
        if (prefix := self._serving(key, tokens)) is None:
            return cache, rest
        if len(rest) < WORTH_ASKING:
            self.counters["local_hits"] += 1
        elif self._breaker.allow():
            restored, remaining = prefix.restore(tokens, beyond=held)
            self._judge(prefix.last_restore)
            if len(remaining) < len(rest):
                found, rest = restored, remaining
                self._restored(tokens, prefix.last_restore)
        else:
            self.counters["miss_breaker"] += 1
        self._turns.begin(tokens, len(tokens) - len(rest))
        return found, rest

    def _serving(self, key: object, tokens: Sequence[int]) -> PrefixCache | None:
        """Who could know these tokens; negative ones stand for images, which have no key."""
        if self._prefix is None or key != self._key:
            return None
        if min(tokens, default=0) < 0:
            self.counters["miss_media"] += 1
            return None
        return self._prefix

    def _judge(self, report: RestoreReport | None) -> None:
        """A daemon that hangs would hold up every answer: leave it alone for a while."""
        if report is not None and not report.restored_tokens and report.seconds >= HANGING_S:
            self._breaker.failed()
        else:
            self._breaker.succeeded()

    def _restored(self, tokens: list[int], report: RestoreReport | None) -> None:
        if report is None:
            return
        self._turns.add_restored(tokens, report.restored_pages)
        self.counters["restored_requests"] += 1
        self.counters["restored_tokens"] += report.restored_tokens
        log.info(
            "%d of %d prompt tokens restored in %.2f s (%.2f MB)",
            report.restored_tokens,
            report.prompt_tokens,
            report.seconds,
            report.bytes / 1e6,
        )

    def inserted(
        self, key: object, tokens: Sequence[int], cache: Cache, cache_type: str = "assistant"
    ) -> None:
        """The server keeps a cache of one sequence that holds ``tokens``: offer it."""
        self._served_at = time.monotonic()
        with _ours("insert", self.counters):
            self._inserted(key, list(tokens), cache, cache_type)

    def _inserted(self, key: object, tokens: list[int], cache: Cache, cache_type: str) -> None:
        if not cache or (prefix := self._serving(key, tokens)) is None:
            return
        event, turn = self._turns.find(tokens)
        if any("Quantized" in type(layer).__name__ for layer in cache):
            # Under the model's own keys others would take them for what the model computed.
            self.counters["drop_quantized"] += 1
            return
        if cache_type == "system":
            if _can_be_cut(cache):
                return  # its pages come with those of the prompt
            event = "prefix"  # nobody can begin within it, so others begin here or nowhere
        # The first prompt of a conversation may be asked again, word for word.
        lasting = event == "prefill" and turn is not None and 2 * turn.cached < len(tokens)
        since = turn.began if turn is not None and turn.alone else None
        pages = self._turns.restored_pages(tokens)
        prefix.remember(cache, turn.cached if turn else 0, pages, since)
        prefix.offer(tokens, cache, event, lasting=lasting)

    # -- idle time ----------------------------------------------------------------

    def idle(self) -> None:
        """The server has nothing to do. At most a short piece of work."""
        self._turns.clear()
        if self._prefix is not None and time.monotonic() - self._served_at >= QUIET_S:
            self._prefix.idle()


def _can_be_cut(cache: Cache) -> bool:
    from mlx_lm.models.cache import can_trim_prompt_cache

    return bool(can_trim_prompt_cache(cache))


@contextmanager
def _ours(what: str, counters: Counter[str]) -> Iterator[None]:
    """A bug of ours costs a cache, never the request."""
    try:
        yield
    except Exception:
        counters[f"bug_{what}"] += 1
        log.exception("%s failed", what)
