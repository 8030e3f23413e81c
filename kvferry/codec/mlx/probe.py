"""What the cache of a model looks like, found out from the model.

Nothing is typed in per model: a token is sent through it, lazily, so that shapes are known
and nothing is computed. Where weights are missing (a rank of a pipeline has its own layers
only) a skeleton without any is made from the config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from kvferry.codec.mlx.leaves import leaves, rows_adapter, state_adapter
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.parts import CacheParts, parts_of, row_names
from kvferry.codec.mlx.shape import ModelShape, StateShape, StreamShape
from kvferry.errors import ModelError

_ROTATED = ("k", "rope_key")


def describe(model: Any, config: Mapping[str, Any]) -> ModelShape:
    """What the cache of a live model looks like, whole even where weights are missing.

    Raises: ModelError: a kind of cache that is not supported.
    """
    return probe(model, config).shape


def reference_model(loaded: LoadedModel) -> Any:
    """All layers, whole: the live model, or without weights where it has but a part of them.

    Raises: ModelError.
    """
    return loaded.model if loaded.whole else _skeleton(loaded.config)[0]


def describe_config(config: Mapping[str, Any]) -> ModelShape:
    """`describe` without a model. Raises: ModelError."""
    return probe(None, config).shape


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A model's shape with what it was told from.

    Attributes:
        model: the one given, or its skeleton.
        cache: one token's, of which no array is computed.
    """

    shape: ModelShape
    model: Any
    cache: Sequence[Any]


def probe(model: Any | None, config: Mapping[str, Any], dtype: mx.Dtype | None = None) -> Probe:
    """`describe`, or without a model `describe_config`.

    Args:
        dtype: of the weights of a skeleton; float32 if None.
    Raises: ModelError.
    """
    cache = None if model is None else _probed_if_held(model)
    if cache is None:
        model, cache = _skeleton(config, dtype)
    return Probe(_shape(model, cache, config), model, cache)


def _probed_if_held(model: Any) -> list[Any] | None:
    try:
        return probed(model)
    except ModelError:
        raise
    except Exception:  # layers without weights fail in as many ways as there are models
        return None


def _skeleton(config: Mapping[str, Any], dtype: mx.Dtype | None = None) -> tuple[Any, list[Any]]:
    from mlx_lm import utils

    try:
        get_classes: Any = utils._get_classes
        model_class, args_class = get_classes(dict(config))
        model = model_class(args_class.from_dict(dict(config)))
        if dtype is not None:
            model.set_dtype(dtype)
        return model, probed(model)
    except ModelError:
        raise
    except Exception as exc:
        first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelError(
            f"the cache of a {config.get('model_type')} model cannot be told from its config: "
            f"{first}"
        ) from exc


def probed(model: Any) -> list[Any]:
    """A cache that has seen one token; no array of it is computed.

    Raises: ModelError: an unknown cache class; and what a model without weights raises.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    parts_of(cache)  # refuses classes that are not known
    model(mx.array([[0]]), cache=cache)
    return cache


def _shape(model: Any, cache: Sequence[Any], config: Mapping[str, Any]) -> ModelShape:
    parts = parts_of(cache)
    streams = _streams(parts, config)
    page_entries, states = [], []
    for entry, layer in enumerate(cache):
        held = [leaf for leaf in leaves(layer) if rows_adapter(leaf) is not None]
        page_entries += [entry] if held else []
        states += [_state(entry, leaf) for leaf in leaves(layer) if rows_adapter(leaf) is None]
    heads = max((stream.heads for stream in streams.values()), default=1)
    width = sum(stream.heads * stream.dim for stream in streams.values())
    return ModelShape(
        layers=len(page_entries),
        kv_heads=heads,
        head_dim=-(-width // (2 * heads)),
        streams=streams,
        model_layers=len(model.layers),
        page_entries=page_entries,
        entry_layers=_entry_layers(model.layers, len(cache)),
        states=states,
    )


def _streams(parts: CacheParts, config: Mapping[str, Any]) -> dict[str, StreamShape]:
    """Of each page layer. Raises: ModelError: layers differ."""
    found: dict[str, StreamShape] = {}
    for index, held in enumerate(parts.rows):
        pairs = [(leaf.keys, leaf.values) for leaf in held]
        names = row_names(len(pairs), _latent(pairs[0], config))
        here = {}
        for pair, both in zip(pairs, names, strict=True):
            for array, name in zip(pair, both, strict=True):
                if array.shape[3]:
                    heads, dim = array.shape[1], array.shape[3]
                    here[name] = StreamShape(name, heads, dim, name in _ROTATED)
        if index and here != found:
            raise ModelError(
                f"page layers 0 and {index} differ in streams, heads or dims: not supported yet"
            )
        found = here
    counts = {stream.heads for stream in found.values()} - {1}
    if len(counts) > 1:
        raise ModelError(f"streams of {sorted(counts)} heads in one layer are not supported")
    return found


def _latent(pair: tuple[mx.array, mx.array], config: Mapping[str, Any]) -> bool:
    """MLA keeps latents where keys are kept, and rotated keys where values are."""
    text = {**config, **(config.get("text_config") or {})}
    sizes = text.get("kv_lora_rank"), text.get("qk_rope_head_dim")
    return (pair[0].shape[1], pair[0].shape[3], pair[1].shape[3]) == (1, *sizes)


def _state(entry: int, leaf: Any) -> StateShape:
    arrays = {name: a.shape[1:] for name, a in state_adapter(leaf).read(leaf).items()}
    return StateShape(entry, type(leaf).__name__, arrays, int(getattr(leaf, "max_size", 0)))


def _entry_layers(layers: Sequence[Any], entries: int) -> list[int]:
    """Models whose last layers share caches, or that have layers without any, have fewer."""
    if entries < len(layers):
        having = [i for i, layer in enumerate(layers) if _has_cache(layer)]
        if len(having) == entries:
            return having
    return list(range(entries))


def _has_cache(layer: Any) -> bool:
    """Nemotron-H has blocks of one kind each; Nemotron's NAS leaves attentions out."""
    return (
        getattr(layer, "block_type", "*") in "M*" and getattr(layer, "self_attn", layer) is not None
    )
