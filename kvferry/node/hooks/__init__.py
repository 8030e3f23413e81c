"""Hooks: where a generation loop meets kvferry. Importing this package loads no mlx.

from kvferry.node.hooks import AsyncPrefixCache, HookOptions, PrefixCache
"""

from typing import TYPE_CHECKING, Any

from kvferry.node.hooks.options import HookOptions

if TYPE_CHECKING:
    from kvferry.node.hooks.aio import AsyncPrefixCache
    from kvferry.node.hooks.prefix_cache import PrefixCache
    from kvferry.node.hooks.report import RestoreReport

__all__ = ["AsyncPrefixCache", "HookOptions", "PrefixCache", "RestoreReport"]


def __getattr__(name: str) -> Any:
    if name == "AsyncPrefixCache":
        from kvferry.node.hooks import aio

        return aio.AsyncPrefixCache
    if name == "PrefixCache":
        from kvferry.node.hooks import prefix_cache

        return prefix_cache.PrefixCache
    if name == "RestoreReport":
        from kvferry.node.hooks import report

        return report.RestoreReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
