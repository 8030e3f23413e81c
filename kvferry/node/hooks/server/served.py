"""What a server was told to serve, and the prefix caches that go with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from kvferry.codec.mlx.leaves import cache_form
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ModelError
from kvferry.node.hooks.group import Alone, Group
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache
from kvferry.node.hooks.server.stored import Plain, Quantizing, Stored, WithDraft

Cache = list[Any]


@dataclass(frozen=True, slots=True)
class Quantized:
    """``--kv-bits``, ``--kv-group-size`` and ``--quantized-kv-start``."""

    bits: int
    group_size: int
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This rank's part of a model that several serve; see `PrefixCache`."""

    group: Group
    layers: tuple[int, int] | None = None
    tensor: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One model, as it is served.

    Attributes:
        draft: the model that speculates for it.
        prefill_step: tokens that the server prefills at a time.
    """

    main: LoadedModel
    draft: LoadedModel | None = None
    quantized: Quantized | None = None
    ranks: Ranks = Ranks(Alone())
    prefill_step: int = 2048


def stored(served: Served, options: HookOptions) -> Stored:
    """Its prefix caches. Raises: FerryError: it cannot be stored, and why."""
    main = _one(served.main, served, options, served.ranks)
    if served.draft is None:
        return main
    try:
        split = _split(served.main.model, served.draft.model)
        # Calibrations are gathered with the model: the draft takes what there is.
        draft = _one(served.draft, served, replace(options, gather_tokens=0), Ranks(Alone()))
    except BaseException:
        main.close()
        raise
    return WithDraft(main, draft, split, _prefiller(served.draft.model, served.prefill_step))


def _one(
    loaded: LoadedModel, served: Served, options: HookOptions, ranks: Ranks
) -> Plain | Quantizing:
    def made(options: HookOptions, make_cache: Callable[[], Cache] | None = None) -> Plain:
        prefix = PrefixCache(
            loaded,
            options,
            group=ranks.group,
            layers=ranks.layers,
            tensor=ranks.tensor,
            make_cache=make_cache,
        )
        return Plain(prefix)

    how = served.quantized
    make_cache = None if how is None else _quantized_maker(loaded.model, how)
    plain = made(options)
    if how is None or make_cache is None:
        return plain
    try:
        return Quantizing(plain, made(replace(options, gather_tokens=0), make_cache), how.start)
    except BaseException:
        plain.close()
        raise


def _quantized_maker(model: Any, how: Quantized) -> Callable[[], Cache] | None:
    """Empty caches of the form that the server turns its own into; None: it turns none."""

    def make() -> Cache:
        return [
            layer.to_quantized(group_size=how.group_size, bits=how.bits)
            if hasattr(layer, "to_quantized")
            else layer
            for layer in make_prompt_cache(model)
        ]

    try:
        return make if cache_form(make()) else None
    except NotImplementedError:  # mlx-lm then serves prompts shorter than ``start``
        return None


def _split(main: Any, draft: Any) -> int:
    """Entries of the model's own in a cache that holds both. Raises: ModelError."""
    own = make_prompt_cache(main)
    if len(own) != len(main.layers):
        raise ModelError("mlx-lm cannot tell this model's cache from its draft model's")
    if not can_trim_prompt_cache(own) or not can_trim_prompt_cache(make_prompt_cache(draft)):
        raise ModelError("speculative decoding takes models whose caches can be cut at a token")
    return len(own)


def _prefiller(model: Any, step: int) -> Callable[[Sequence[int], Cache | None], Cache]:
    def prefill(tokens: Sequence[int], cache: Cache | None) -> Cache:
        cache = list(make_prompt_cache(model)) if cache is None else cache
        for at in range(0, len(tokens), step):
            model(mx.array([list(tokens[at : at + step])]), cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache

    return prefill
