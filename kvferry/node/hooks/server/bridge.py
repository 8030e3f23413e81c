"""Between the server's prompt cache and kvferry: what is at hand first, then what is stored.

Everything here runs on the thread that runs the model, and nothing that goes wrong here
reaches the server: it is a miss, counted, and the model prefills.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from kvferry.cluster.backoff import Breaker
from kvferry.errors import FerryError
from kvferry.node.hooks.group import Alone, Group
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.server.ahead import Ahead
from kvferry.node.hooks.server.served import Served, stored
from kvferry.node.hooks.server.stored import Found, Moment, Stored
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

    Of a model that several ranks serve, each has one; all calls but `idle` are made on all
    of them alike.

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
        self._stored: Stored | None = None
        self._group: Group = Alone()
        self._ahead = Ahead()
        self._turns, self._breaker = Turns(), Breaker(first_s=1.0, most_s=30.0)
        self._served_at = time.monotonic()

    # -- models -------------------------------------------------------------------

    def attach(self, key: object, served: Served) -> None:
        """A model was loaded; ``key`` is what the server calls it. Never raises.

        All ranks of it enter this together, and store or do without together.
        """
        self.detach()
        made: Stored | None = None
        self._group = served.ranks.group
        with _ours("attach", self.counters):
            try:
                made = stored(served, self._options)
            except FerryError as exc:
                log.warning("served without stored caches: %s", exc)
        if self._abandoned(made is not None):
            if made is not None:
                log.warning("served without stored caches, since another rank has to be")
                made.close()
            return
        self._key, self._stored = key, made
        with _ours("ready", self.counters):
            assert made is not None  # noqa: S101 - or it would have been abandoned
            made.ready(self._ready_timeout_s)

    def absent(self, group: Group) -> None:
        """This rank has nothing to `attach`, and so no rank of the model stores."""
        self.detach()
        self._group = group
        self._abandoned(ours=False)

    def _abandoned(self, ours: bool) -> bool:
        return not self._group.all_min([int(ours)])[0]

    def detach(self) -> None:
        """The model goes: hand over what is still to be stored. May be called twice."""
        stored, self._stored, self._key = self._stored, None, None
        self._turns.clear()
        if stored is not None:
            with _ours("close", self.counters):
                stored.close()
                self._ahead.clear()
            self.counters.update(stored.counters)

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
        if self._stored is None or key != self._key:
            return cache, rest
        held, allowed = self._together(len(tokens) - len(rest))
        if held < 0:  # ranks found different caches of their own: none is of use
            cache, held = None, 0
        text = _text_of(tokens)
        if len(text) < len(tokens):
            self.counters["with_images"] += 1
        if len(text) - held < WORTH_ASKING:
            self.counters["local_hits"] += bool(held)
        elif not allowed:
            self.counters["miss_breaker"] += 1
        else:
            # A picture's first token is no token, but it leaves all text to be restored.
            wanted = text if len(text) == len(tokens) else [*text, 0]
            self._breaker.allow()
            started = time.monotonic()
            loaded, seconds = self._ahead.take(wanted)
            found = self._stored.restore(wanted, held, loaded)
            seconds += time.monotonic() - started
            self._judge(found, seconds)
            if found is not None:
                self._restored(tokens, found, seconds)
                cache, held = found.cache, found.tokens
        self._turns.begin(tokens, held)
        return cache, tokens[held:]

    def look_ahead(self, key: object, tokens: Sequence[int], held: int) -> bool:
        """Begin to fetch beside the model what `fetch` will want; it generates meanwhile.

        Args:
            held: tokens that the server's own cache has.
        Returns: whether to wait for `looking`.
        """
        with _ours("ahead", self.counters):
            stored = self._stored
            if stored is None or key != self._key or self._group.size > 1:
                return False
            if len(tokens) - held < WORTH_ASKING or min(tokens) < 0 or self._breaker.wait_s():
                return False
            return self._ahead.begin(tokens, partial(stored.ahead, tokens, held))
        return False

    def looking(self, timeout_s: float = 0.0) -> bool:
        """Whether that is still under way, after waiting for so long."""
        return self._ahead.under_way(timeout_s)

    def _together(self, held: int) -> tuple[int, bool]:
        """(tokens at hand on every rank, -1 where they differ; whether to ask the daemons)."""
        allowed = self._breaker.wait_s() <= 0
        least, most, all_allow = self._group.all_min([held, -held, int(allowed)])
        return (held if least == -most else -1), bool(all_allow)

    def _judge(self, found: Found | None, seconds: float) -> None:
        """A daemon that hangs would hold up every answer: leave it alone for a while."""
        if found is None and seconds >= HANGING_S:
            self._breaker.failed()
        else:
            self._breaker.succeeded()

    def _restored(self, tokens: list[int], found: Found, seconds: float) -> None:
        self.counters["restored_requests"] += 1
        self.counters["restored_tokens"] += found.tokens
        log.info(
            "%d of %d prompt tokens restored in %.2f s (%.2f MB)",
            found.tokens,
            len(tokens),
            seconds,
            found.bytes / 1e6,
        )

    def aligned(self, key: object, tokens: list[int], cache: Cache) -> list[int]:
        """The tokens that a cache the server is about to keep really holds; it may be cut."""
        with _ours("aligned", self.counters):
            if cache and self._stored is not None and key == self._key:
                return self._stored.aligned(tokens, cache)
        return tokens

    def prefilled(self, cache: Cache) -> None:
        """The request that was fetched last is the only one, and ``cache`` holds its prompt.

        Where the server serves one at a time it keeps the end of the turn only; this is for
        when the same is asked again.
        """
        with _ours("prefilled", self.counters):
            turn = self._turns.last()
            if turn is not None and len(turn.tokens) - turn.cached >= WORTH_ASKING:
                self._inserted(self._key, turn.tokens[:-1], cache, "user")

    def inserted(
        self, key: object, tokens: Sequence[int], cache: Cache, cache_type: str = "assistant"
    ) -> None:
        """The server keeps a cache of one sequence that holds ``tokens``: offer it."""
        self._served_at = time.monotonic()
        with _ours("insert", self.counters):
            self._inserted(key, list(tokens), cache, cache_type)

    def _inserted(self, key: object, tokens: list[int], cache: Cache, cache_type: str) -> None:
        if not cache or self._stored is None or key != self._key:
            return
        event, turn = self._turns.find(tokens)
        text = _text_of(tokens)
        if len(text) < len(tokens) and not _can_be_cut(cache):
            self.counters["drop_images"] += 1
            return
        if cache_type == "system":
            if _can_be_cut(cache):
                return  # its pages come with those of the prompt
            event = "prefix"  # nobody can begin within it, so others begin here or nowhere
        # The first prompt of a conversation may be asked again, word for word.
        lasting = event == "prefill" and turn is not None and 2 * turn.cached < len(tokens)
        self._stored.offer(text, cache, Moment(event, lasting, turn))

    # -- idle time ----------------------------------------------------------------

    def idle(self) -> None:
        """The server has nothing to do. At most a short piece of work."""
        self._turns.clear()
        if self._stored is not None and time.monotonic() - self._served_at >= QUIET_S:
            self._stored.idle()


def _text_of(tokens: list[int]) -> list[int]:
    """What comes before the first image: the server gives those negative numbers."""
    return next((tokens[:at] for at, token in enumerate(tokens) if token < 0), tokens)


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
