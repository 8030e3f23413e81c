"""Caches that lack tokens: which codecs may drop them, and where what is left goes.

A `DynamicCache` counts rows and goes on at their number. What a codec left can be in one only
side by side, at positions 0, 1, 2, ...; for gaps, and for entries that stand for several
tokens, neither it nor attention has a place.
"""

from collections.abc import Iterable, Mapping, Sequence

from transformers.cache_utils import DynamicLayer

from kvferry.codec.base import Codec, PageTensors, drops_tokens, takes_whole_context
from kvferry.codec.dropping import PLACES
from kvferry.codec.join import join_tokens
from kvferry.codec.moving import side_by_side
from kvferry.codec.rope import RopeSpec
from kvferry.errors import ConfigError, ModelError

_KEEPS = "one that keeps every token"
_SHORTENS = "streaming or random with positions = contiguous"


class LackingLayer(DynamicLayer):
    """Rows from which tokens are missing: they are never stored as those of a prompt."""


def check_keeps(codec: Codec, where: str) -> None:
    """Raises: ConfigError: a codec that drops tokens, which ``where`` cannot do without."""
    if drops_tokens(codec):
        raise ConfigError(
            "codec",
            codec.name,
            f"{_KEEPS}: {where} must have them all; restore(offload(...)) gives a DynamicCache "
            "without those that a codec drops",
        )


def shortens(codecs: Mapping[tuple[int, int], Codec]) -> bool:
    """Whether codecs of a model's layers drop tokens, in a way that `side_by_side` can place.

    Raises: ConfigError: otherwise, or not the same of all layers.
    """
    every = list(codecs.values())
    dropping = [codec for codec in every if drops_tokens(codec)]
    for codec in dropping:
        if not takes_whole_context(codec) or codec.params.get("positions") != PLACES[0]:
            raise ConfigError(
                "codec",
                codec.name,
                f"{_KEEPS}, or {_SHORTENS}: a DynamicCache goes on at its number of rows and "
                "attention in transformers counts each once",
            )
        if any(other != codec for other in every):
            names = ", ".join(sorted({other.name for other in every}))
            raise ConfigError("codec", names, f"the same for all layers where {codec.name} is one")
    return bool(dropping)


def lacks(pages: Iterable[PageTensors]) -> bool:
    """Whether some of the pages' tokens are missing."""
    return any(page.kept is not None for page in pages)


def placed(pages: Sequence[PageTensors], ropes: Sequence[RopeSpec]) -> list[PageTensors]:
    """All entries of each layer side by side, keys rotated anew to follow.

    Args:
        pages: as `kvferry.hf.fill` takes them.
        ropes: of each of the model's layers.
    Returns: a page of each layer, of tokens (0, entries), as if nothing were missing.
    Raises: ModelError: entries that cannot be, or layers that come to different numbers;
        UnsupportedTensorError: streams that cannot be moved.
    """
    for kept in (page.kept for page in pages if page.kept is not None):
        if kept.weights is not None:
            raise ModelError(
                "a blob's entries stand for several tokens each (centroid), which attention in "
                f"transformers cannot weigh: store the cache with {_SHORTENS}"
            )
        if not kept.contiguous:
            raise ModelError(
                "a blob's entries are to stay at their original positions, and a DynamicCache "
                f"goes on at its number of rows: store the cache with {_SHORTENS}"
            )
    layers = sorted({layer for page in pages for layer in range(*page.layers)})
    if len(ropes) <= layers[-1]:
        raise ModelError(
            "entries cannot be put side by side, since it is not known how keys rotate: "
            f"store the cache with {_KEEPS}"
        )
    end = max(page.tokens[1] for page in pages)
    made = [side_by_side(_whole(pages, at, end), ropes[at : at + 1]) for at in layers]
    counts = {page.entries for page in made}
    if len(counts) > 1:
        raise ModelError(
            f"layers have {sorted(counts)} entries and a DynamicCache equally many: store all "
            "layers with the same codec"
        )
    return made


def _whole(pages: Iterable[PageTensors], layer: int, end: int) -> PageTensors:
    """All of one layer. Raises: ModelError: pages that do not follow one another."""
    mine = sorted(
        (page.cut_layers((layer, layer + 1)) for page in pages if layer in range(*page.layers)),
        key=lambda page: page.tokens,
    )
    check_follow(mine, layer, end)
    return join_tokens(mine)


def check_follow(mine: Sequence[PageTensors], layer: int, end: int) -> None:
    """Raises: ModelError: pages of one layer that are not tokens 0 to ``end``, or not alike."""
    edges = [0, *(page.tokens[1] for page in mine)]
    if [page.tokens[0] for page in mine] != edges[:-1] or edges[-1] != end:
        raise ModelError(f"pages of layer {layer} do not hold tokens 0 to {end} without gaps")
    for page in mine:
        if set(page.streams) != {"k", "v"}:
            raise ModelError(f"pages of streams {sorted(page.streams)} do not fit a DynamicCache")
    for name in ("k", "v"):
        held = [page.streams[name] for page in mine]
        if len({(s.dtype, s.data.shape[1], s.data.shape[3]) for s in held}) > 1:
            raise ModelError("pages differ in heads, dimensions or element type")
