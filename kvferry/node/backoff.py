"""When to try again; shared with the store, which has remotes of its own."""

from kvferry.cluster.backoff import Backoff, Breaker

__all__ = ["Backoff", "Breaker"]
