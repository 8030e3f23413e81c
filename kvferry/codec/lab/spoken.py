"""What the model goes on to say with a restored cache, against what it would have said."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import PageTensors
from kvferry.codec.lab.evaluate import Prepared
from kvferry.codec.lab.forward import Done
from kvferry.codec.lab.greedy import first_difference, greedy, token_match


def words(prepared: Prepared, pages: Sequence[PageTensors], count: int, done: Done) -> list[int]:
    """The likeliest ``count`` tokens, one after the other, that follow context and window.

    Args:
        pages: of context and window; fill the cache.
        done: called with 1 for each token.
    Raises: ModelError.
    """
    cache: list[Any] = list(make_prompt_cache(prepared.model))
    prepared.snapshot.refill(cache, pages)
    return greedy(prepared.model, cache, prepared.reference[0].fed[0], count, done)


def exact_pages(prepared: Prepared) -> list[PageTensors]:
    """Context and window as the model made them."""
    held = prepared.snapshot
    return [held.page(held.layers, (0, held.tokens))]


def spoken(exact: Sequence[int], own: Sequence[int]) -> dict[str, object]:
    """As ``kvferry eval --json`` has it: how much of the two is the same."""
    return {
        "greedy_tokens": len(own),
        "token_match": token_match(exact, own),
        "first_difference": first_difference(exact, own),
    }
